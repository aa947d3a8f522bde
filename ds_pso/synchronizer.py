"""What happens at a sync point: agree on fitness, plan, exchange, update, publish."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ds_pso.errors import ConfigError, SwarmError
from ds_pso.exchange import Exchange
from ds_pso.fitness import FitnessWindow, combine
from ds_pso.rules import Plan, Rule, SyncPoint
from ds_pso.shards import Shards
from ds_pso.world import World

Probe = Callable[[], Tensor | float]


@dataclass
class SyncTotals:
    """What the sync points have cost this rank so far."""

    count: int = 0
    seconds: float = 0.0  # wall time, waiting for peers included
    waited_s: float = 0.0  # until the last peer arrived
    bytes_received: int = 0


class Synchronizer:
    """Knows the order of things at a sync point; leaves each of them to its own layer.

    Args:
        probe: loss on a batch that is the same for every particle, or None to rank the particles
            by their training loss.
    """

    def __init__(self, world: World, exchange: Exchange, rule: Rule, shards: Shards, probe: Probe | None) -> None:
        self.world = world
        self.exchange = exchange
        self.rule = rule
        self.shards = shards
        self.probe = probe
        self.totals = SyncTotals()
        self.losses: tuple[float, ...] = (math.nan,) * exchange.num_particles  # at the last sync point
        self.state: list[dict[str, Tensor]] = []  # of the rule, one dict per shard
        self.memory: Mapping[str, Any] = {}  # of the rule
        self._check_same_model()
        self._start_alike()

    def _check_same_model(self) -> None:
        prints = self.world.gather("the model of every particle", self.shards.fingerprint())
        size = self.world.layout.particle_size
        for rank, other in enumerate(prints):
            if other != prints[rank % size]:
                raise SwarmError(
                    f"the model of {self.world.describe(rank)} is not that of particle 0 (names, shapes, dtypes or "
                    "ZeRO partitioning differ); build the same model with the same config on every rank",
                    agreed=True,
                )

    def _start_alike(self) -> None:
        """Give every particle the weights of particle 0, whatever its random seed was."""
        self.shards.zero_padding()
        for tensors in (self.shards.tensors, self.shards.frozen()):
            for piece, received in self.exchange.from_one(tensors, source=0):
                piece.of(tensors[piece.tensor]).copy_(received)
        with self._flat_buffers() as buffers:
            for piece, received in self.exchange.from_one(buffers, source=0):
                piece.of(buffers[piece.tensor]).copy_(received)
        self.shards.publish()
        self.state = [self.rule.init_state(x) for x in self.shards.tensors]

    def sync(self, window: FitnessWindow) -> dict[str, Any]:
        """Meet the other particles, and empty the window. Called alike on all ranks.

        Returns:
            What to log of it.

        Raises:
            PeerError: somebody did not come within the timeout; names who.
            SwarmError: the shards were offloaded, or the rule needs a loss and saw none.
        """
        self.shards.check_present()
        begin, bytes_before = time.perf_counter(), self.exchange.bytes_received
        index = self.totals.count
        layout = self.world.layout  # mates too: a frozen one would be waited for without a word inside the particle
        self.world.roll_call(f"sync {index}", sorted({*layout.peers, *layout.mates}))
        waited = time.perf_counter() - begin
        if index:
            self.world.forget(f"sync {index - 1}")

        self.shards.zero_padding()
        point = self._agree_on_fitness(index, window)
        plan = self._exchange(point) if any(point.alive) else None
        self.shards.publish()
        window.clear()

        self.losses = point.fitness
        seconds = time.perf_counter() - begin
        received = self.exchange.bytes_received - bytes_before
        self.totals.count += 1
        self.totals.seconds += seconds
        self.totals.waited_s += waited
        self.totals.bytes_received += received
        record: dict[str, Any] = {"sync": index, "losses": point.fitness, "alive": point.alive}
        if plan is not None:
            record |= {"best": plan.source} if plan.receive == "one" else {"weights": plan.weights}
        return record | {"seconds": seconds, "waited_s": waited, "bytes_received": received}

    def _agree_on_fitness(self, index: int, window: FitnessWindow) -> SyncPoint:
        """One loss per particle, the same bits on every rank."""
        total, count = window.total, float(window.count)
        if self.probe is not None:
            with torch.no_grad():
                total, count = float(self.probe()), 1.0
        nothing_new = count == 0 and index > 0  # a sync point right after another
        if count == 0 and self.rule.uses_fitness and not nothing_new:
            raise SwarmError(
                "this sync_mode ranks particles by their loss, and none was seen; "
                "call engine.backward(loss), not loss.backward()"
            )
        row = [total, count, float(self.shards.all_finite())]
        fitness, alive = combine(self.world.particle_gather(row))
        if nothing_new:
            fitness = self.losses[self.exchange.particle]
        table = self.exchange.all_gather([fitness, float(alive)])
        return SyncPoint(index, tuple(row[0] for row in table), tuple(row[1] == 1.0 for row in table))

    def _exchange(self, point: SyncPoint) -> Plan:
        plan = self.rule.plan(point, self.memory)
        shards, me = self.shards.tensors, self.exchange.particle
        for x, state in zip(shards, self.state, strict=True):
            self.rule.before_exchange(x, state, plan, me)
        outgoing = shards if plan.send == "x" else [state[plan.send] for state in self.state]
        if plan.receive == "mean":
            arriving = self.exchange.weighted_mean(outgoing, plan.weights)
        else:
            arriving = self.exchange.from_one(outgoing, plan.source)
        for piece, received in arriving:
            state = {name: piece.of(value) for name, value in self.state[piece.tensor].items()}
            self.rule.update(piece.of(shards[piece.tensor]), received, state, plan, me)
        self.memory = plan.memory
        self._average_buffers(point)
        if not point.alive[me]:
            self.shards.reset_optimizer_state()
        return plan

    def _average_buffers(self, point: SyncPoint) -> None:
        """Statistics are no parameters: whatever the rule, they become the mean of the living."""
        with self._flat_buffers() as buffers:
            for piece, received in self.exchange.weighted_mean(buffers, point.mean_weights()):
                piece.of(buffers[piece.tensor]).copy_(received)

    @contextlib.contextmanager
    def _flat_buffers(self) -> Iterator[list[Tensor]]:
        """The buffers, flat; what is written to them counts, also where flattening had to copy."""
        buffers = [buffer for _, buffer in self.shards.buffers()]
        flat = [buffer.reshape(-1) for buffer in buffers]
        yield flat
        for buffer, values in zip(buffers, flat, strict=True):
            if values.data_ptr() != buffer.data_ptr():
                buffer.copy_(values.view(buffer.shape))

    # -- for export and checkpoints ---------------------------------------------------------

    def collect(self, which: Literal["consensus", "best"]) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the shards and flat buffers of the mean of the finite particles, or of the best.

        Raises:
            ConfigError: no particle has finite weights.
        """
        self.shards.zero_padding()
        finite = all(row[0] for row in self.world.particle_gather([float(self.shards.all_finite())]))
        alive = tuple(bool(row[0]) for row in self.exchange.all_gather([float(finite)]))
        if not any(alive):
            raise ConfigError("no particle has finite weights, so there is no model; resume an older checkpoint")
        point = SyncPoint(self.totals.count, self.losses, alive)
        weights = point.best_weights() if which == "best" else point.mean_weights()
        copies = []
        for tensors in (self.shards.tensors, [buffer.reshape(-1) for _, buffer in self.shards.buffers()]):
            copy = [torch.empty_like(t) for t in tensors]
            for piece, received in self.exchange.weighted_mean(tensors, weights):
                piece.of(copy[piece.tensor]).copy_(received)
            copies.append(copy)
        return copies[0], copies[1]
