"""What happens at a sync point: agree on fitness, plan, exchange, update, publish."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ds_pso.errors import ConfigError, SwarmError
from ds_pso.exchange import Exchange, Piece
from ds_pso.fitness import FitnessWindow, combine
from ds_pso.letters import Mailbox
from ds_pso.rules import Place, Plan, Rule, SyncPoint
from ds_pso.shards import Shards
from ds_pso.wire import FORMATS, Differences
from ds_pso.world import World

Probe = Callable[[int], Tensor | float]


@dataclass
class SyncTotals:
    """What the sync points have cost this rank so far."""

    count: int = 0
    seconds: float = 0.0  # wall time, waiting for peers included
    waited_s: float = 0.0  # until the last peer arrived
    overlapped_s: float = 0.0  # in the background, while training went on
    bytes_received: int = 0


@dataclass
class Pending:
    """A meeting that goes on while training does.

    ``movement`` holds copies of the shards and the flat buffers as they were at the beginning. In the end: how far
    the shards shall move, or where they shall be if the particle was not alive; and the mean of the buffers, which
    are statistics (a variance that was corrected could become negative).
    """

    begun: int  # optimizer step
    due: int  # optimizer step after which the movement is made
    movement: list[Tensor]
    settled_s: float = 0.0  # what ``World.settled_s`` was at the beginning
    record: dict[str, Any] = field(default_factory=dict)  # to log
    lr_factors: Sequence[float] = ()
    held_up_s: float = 0.0  # training, to begin it
    background_s: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All but the tensors, once the meeting is over; JSON values."""
        names = ("begun", "due", "record", "lr_factors", "held_up_s", "background_s")
        return {name: getattr(self, name) for name in names}


class Synchronizer:
    """Knows the order of things at a sync point; leaves each of them to its own layer.

    Args:
        probe: loss on a batch that is the same for every particle; its argument counts the sync points.
        rank_by: whether that loss is the fitness, or the training loss since the last sync point.
        total: sync points of the whole training, if known.
        optimizer_state: what becomes of the optimizer's moments at a sync point.
        wire: how weights travel.
    """

    def __init__(
        self,
        world: World,
        exchange: Exchange,
        rule: Rule,
        shards: Shards,
        *,
        probe: Probe | None = None,
        rank_by: Literal["train", "probe"] = "train",
        total: int | None = None,
        optimizer_state: Literal["keep", "average", "reset"] = "keep",
        wire: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.rule = rule
        self.shards = shards
        self.probe = probe
        self.rank_by = rank_by
        self.total = total
        self.optimizer_state = optimizer_state
        self.totals = SyncTotals()
        self.losses: tuple[float, ...] = (math.nan,) * exchange.num_particles  # at the last sync point
        self.state: list[dict[str, Tensor]] = []  # of the rule, one dict per shard
        self.memory: Mapping[str, Any] = {}  # of the rule
        self._check_same_model()
        self._start_alike()
        self.differences = None if wire == "fp32" else Differences(FORMATS[wire], shards.tensors)
        self.pending: Pending | None = None
        self._mailbox = world.open_mailbox() if rule.max_staleness is not None else None
        self._letter_bytes = 0

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
        assert self.pending is None, "finish what is pending first"
        self.shards.check_present()
        begin, bytes_before = time.perf_counter(), self.exchange.bytes_received
        layout = self.world.layout  # mates too: a frozen one would be waited for without a word inside the particle
        waited = self._wait_for(layout.peers, layout.mates) if self._mailbox is None else 0.0
        self.shards.zero_padding()
        point = self._compare(self._own_row(window))
        note: dict[str, Any] = {}
        if self._mailbox is not None:
            note = self._take_letter(self._mailbox, point)
        elif any(point.alive):
            note = self._follow_rule(point)
        self.shards.publish()
        window.clear()

        self.losses = point.fitness
        seconds = time.perf_counter() - begin
        received = self.exchange.bytes_received - bytes_before
        self.totals.count += 1
        self.totals.seconds += seconds
        self.totals.waited_s += waited
        self.totals.bytes_received += received
        record: dict[str, Any] = {"sync": point.index, "losses": point.fitness, "alive": point.alive}
        return record | note | {"seconds": seconds, "waited_s": waited, "bytes_received": received}

    def begin(self, window: FitnessWindow, step: int, delay: int) -> None:
        """Meet the other particles in the background, and empty the window. Called alike on all ranks.

        Args:
            step: the optimizer step that has just been made.
            delay: ``finish`` will be called this many steps later.

        Raises:
            SwarmError: as ``sync`` does.
        """
        assert self.pending is None, "finish what is pending first"
        self.shards.check_present()
        begin = time.perf_counter()
        self._wait_for(self.world.layout.mates)
        self.shards.zero_padding()
        with self._flat_buffers() as buffers:
            movement = [t.clone() for t in (*self.shards.tensors, *buffers)]
        row = self._own_row(window)
        window.clear()
        pending = self.pending = Pending(step, step + delay, movement, self.world.settled_s)
        pending.held_up_s = time.perf_counter() - begin
        self.world.in_background(lambda: self._meet(pending, row))

    def _meet(self, pending: Pending, row: list[float]) -> None:
        """What peers do together, on copies of the shards; the particle's own ranks are busy training."""
        begin, bytes_before = time.perf_counter(), self.exchange.bytes_received
        waited = self._wait_for(self.world.layout.peers)
        point = self._compare(row)
        note: dict[str, Any] = {}
        if any(point.alive):
            shards, buffers = self._split(pending.movement)
            note, pending.lr_factors = self._move(shards, buffers, point)
        pending.record = {"sync": point.index, "losses": point.fitness, "alive": point.alive, **note}
        pending.record |= {"waited_s": waited, "bytes_received": self.exchange.bytes_received - bytes_before}
        pending.background_s = time.perf_counter() - begin

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Those that belong to the shards, and those that belong to the buffers."""
        return tensors[: len(self.state)], tensors[len(self.state) :]

    def _move(
        self, shards: Sequence[Tensor], buffers: Sequence[Tensor], point: SyncPoint
    ) -> tuple[dict[str, Any], tuple[float, ...]]:
        """Turn the tensors into what ``Pending.movement`` says.

        Returns:
            What to log of it, and the particles' factors of the learning rate.
        """
        alive, me = point.alive[self.exchange.particle], Place(self.exchange.particle)
        for piece, received in self.exchange.weighted_mean(buffers, point.mean_weights()):
            piece.of(buffers[piece.tensor]).copy_(received)
        plan = self.rule.plan(point, self.memory)
        if plan.score:
            raise SwarmError(
                "swarm.delay: the rule scores weights before it settles, and training has gone on meanwhile; let its "
                "uses_probe be true, so that this is told at once, or use 0",
                agreed=True,
            )
        for x, state in zip(shards, self.state, strict=True):
            self.rule.before_exchange(x, state, plan, me)
        note, arriving = self._receive(plan, shards)
        for piece, received in arriving:
            x = piece.of(shards[piece.tensor])
            before = x.clone()
            self._update(shards[piece.tensor], piece, received, plan)
            if self.differences is not None and self.rule.ends_equal:
                piece.of(self.differences.common[piece.tensor]).copy_(x)
            if alive:
                x.sub_(before)
        self.memory = plan.memory
        return note, plan.lr_factors

    def _apply(self, pending: Pending) -> None:
        """Make the movement."""
        me, shards = self.exchange.particle, self.shards.tensors
        moved, mean = self._split(pending.movement)
        if pending.record["alive"][me]:
            for x, movement in zip(shards, moved, strict=True):
                x.add_(movement)
        else:
            self._replace(shards, moved)
        with self._flat_buffers() as buffers:
            self._replace(buffers, mean)
        if pending.lr_factors:
            self.shards.lr_factor = pending.lr_factors[me]
            pending.record["lr_factors"] = pending.lr_factors
        if self.optimizer_state == "reset" or not pending.record["alive"][me]:
            self.shards.reset_optimizer_state()

    def finish(self, window: FitnessWindow) -> dict[str, Any]:
        """Wait for the meeting that was begun, and move by what came of it. Called alike on all ranks.

        If the particle was not alive then, the losses since then were those of weights that are gone now: ``window``
        forgets them.

        The correction of multi-step delayed updates: x <- result + (x now - x when it began).

        Returns, raises:
            As ``sync`` does.
        """
        self.shards.check_present()
        begin, pending = time.perf_counter(), self.pending
        assert pending is not None
        # An evaluation or a checkpoint may have had to wait for it before.
        earlier = self.world.settled_s - pending.settled_s
        self.world.settle()
        waited_for = self.world.settled_s - pending.settled_s
        record = pending.record
        if any(record["alive"]):
            self._apply(pending)
        if not record["alive"][self.exchange.particle]:
            window.clear_losses()
        self.shards.publish()
        self.pending = None

        self.losses = tuple(record["losses"])
        seconds = pending.held_up_s + earlier + time.perf_counter() - begin
        overlapped = max(0.0, pending.background_s - waited_for)
        self.totals.count += 1
        self.totals.seconds += seconds
        self.totals.waited_s += record["waited_s"]
        self.totals.overlapped_s += overlapped
        self.totals.bytes_received += record["bytes_received"]
        return record | {"begun": pending.begun, "seconds": seconds, "overlapped_s": overlapped}

    @property
    def next_is_last(self) -> bool:
        """Whether no sync point follows the next one, as far as anybody knows."""
        return self.total is not None and self.totals.count + 1 >= self.total

    def _wait_for(self, *groups: Sequence[int]) -> float:
        """Roll call; returns its seconds."""
        begin, turn = time.perf_counter(), self.world.turn("sync")
        self.world.roll_call(f"sync {turn}", sorted({rank for ranks in groups for rank in ranks}))
        if turn > 1:  # the last one may have been of others
            self.world.forget(f"sync {turn - 2}")
        return time.perf_counter() - begin

    def _own_row(self, window: FitnessWindow) -> list[float]:
        """Of this particle, the same bits on all its ranks: its loss, whether it is alive, its optimizer steps."""
        index = self.totals.count
        total, count = window.total, float(window.count)
        if self.rank_by == "probe":
            total, count = self._probe_loss(), 1.0
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
        return [fitness, float(alive), float(window.steps)]

    def _compare(self, mine: list[float]) -> SyncPoint:
        """One loss per particle, the same bits on every rank; of other particles NaN if nobody waits for them."""
        table = [[math.nan, 1.0, 0.0] for _ in range(self.exchange.num_particles)]
        table[self.exchange.particle] = mine
        if self._mailbox is None:
            table = self.exchange.all_gather(mine)
        return SyncPoint(
            self.totals.count,
            fitness=tuple(row[0] for row in table),
            alive=tuple(row[1] == 1.0 for row in table),
            total=self.total,
            steps=tuple(int(row[2]) for row in table),
        )

    def _probe_loss(self) -> float:
        if self.probe is None:
            raise SwarmError(
                "the rule scores weights on a probe batch, and swarm.attach got none; "
                "let its uses_probe be true, so that this is told at once",
                agreed=True,
            )
        with torch.no_grad():
            return float(self.probe(self.totals.count))

    def _score(self) -> tuple[float, ...]:
        """Loss of every particle's present weights on the probe batch, shape (P,); inf if not finite."""
        rows = self.world.particle_gather([self._probe_loss()])
        table = self.exchange.all_gather([sum(row[0] for row in rows) / len(rows)])
        return tuple(row[0] if math.isfinite(row[0]) else math.inf for row in table)

    def _follow_rule(self, point: SyncPoint) -> dict[str, Any]:
        """Carry out the rule's plans, one after the other; returns what to log of them."""
        self._average_buffers(point)
        plan = self.rule.plan(point, self.memory)
        note = self._carry_out(plan)
        while plan.score:
            self.shards.publish()
            plan = self.rule.proceed(plan, self._score())
            note |= self._carry_out(plan)
        if self.differences is not None and self.rule.ends_equal:
            self.differences.agree_on(self.shards.tensors)
        self.memory = plan.memory
        if plan.lr_factors:
            self.shards.lr_factor = plan.lr_factors[self.exchange.particle]
            note["lr_factors"] = plan.lr_factors
        self._treat_optimizer_state(point)
        return note

    def _carry_out(self, plan: Plan) -> dict[str, Any]:
        """Move what the plan asks for, and update the shards with it."""
        shards, place = self.shards.tensors, Place(self.exchange.particle)
        for x, state in zip(shards, self.state, strict=True):
            self.rule.before_exchange(x, state, plan, place)
        note, arriving = self._receive(plan, shards)
        for piece, received in arriving:
            self._update(shards[piece.tensor], piece, received, plan)
        return note

    def _receive(self, plan: Plan, shards: Sequence[Tensor]) -> tuple[dict[str, Any], Iterator[tuple[Piece, Tensor]]]:
        """What to log of the plan, and what it asks for, piece by piece."""
        outgoing = shards if plan.send == "x" else [state[plan.send] for state in self.state]
        note = dict(plan.note)
        if plan.receive == "mean":
            note["weights"] = plan.weights
            if self.differences is None:
                arriving = self.exchange.weighted_mean(outgoing, plan.weights)
            else:
                arriving = self.exchange.mean_by_differences(
                    outgoing, plan.weights, self.differences, feedback=not plan.tentative
                )
        elif plan.receive == "one":
            note["sources"] = plan.sources
            arriving = self._from_each(outgoing, plan.sources)
        else:
            arriving = self.exchange.from_self(shards)
        return note, arriving

    def _from_each(self, outgoing: Sequence[Tensor], sources: Sequence[int]) -> Iterator[tuple[Piece, Tensor]]:
        if self.differences is None:
            return self.exchange.from_each(outgoing, sources)
        if len(set(sources)) > 1:
            raise SwarmError(
                "swarm.wire: the rule gives each particle something else, and only what all receive can be sent as a "
                'difference; let its receives_alike be false, or use "fp32"',
                agreed=True,
            )
        return self.exchange.from_one_by_differences(outgoing, sources[0], self.differences)

    def _update(self, x: Tensor, piece: Piece, received: Tensor, plan: Plan) -> None:
        """Let the rule update a piece of shard ``x``, one parameter at a time if it asks for that."""
        me = self.exchange.particle
        parts = [(piece.start, piece.stop, "")]
        if self.rule.per_parameter:
            segments = (s for s in self.shards.segments if s.shard == piece.tensor)
            parts = [
                (max(piece.start, s.shard_start), min(piece.stop, s.shard_start + s.numel), s.name) for s in segments
            ]
        for start, stop, name in parts:
            if start < stop:
                state = {key: value[start:stop] for key, value in self.state[piece.tensor].items()}
                arrived = received[start - piece.start : stop - piece.start]
                self.rule.update(x[start:stop], arrived, state, plan, Place(me, name))

    def _take_letter(self, mailbox: Mailbox, point: SyncPoint) -> dict[str, Any]:
        """Send the particle's state to a peer, and use what came meanwhile.

        Waits for no other particle, nor for the store: that may lie in a process that is frozen or gone.
        """
        me, shards = self.exchange.particle, self.shards.tensors
        others = self.exchange.num_particles - 1
        peer = (me + 1 + point.index % others) % (others + 1)  # each in turn
        with self._flat_buffers() as buffers:
            tensors = [*shards, *buffers]
            # Whatever the ranks of a particle do with a letter, they do together.
            busy = any(row[0] for row in self.world.particle_gather([float(mailbox.busy(peer))]))
            if point.alive[me] and not busy:
                mailbox.send(tensors, point.index, peer)
            letter = mailbox.newest()
            mine = [-1.0, -1.0] if letter is None else [float(letter.sender), float(letter.index)]
            rows = self.world.particle_gather(mine)
            self.exchange.bytes_received += mailbox.bytes_received - self._letter_bytes
            self._letter_bytes = mailbox.bytes_received
            if letter is None or any(row != mine for row in rows):
                return {"from": None}  # the same letter will have come to all by the next sync point, or a newer one
            mailbox.drop(letter)
            assert self.rule.max_staleness is not None
            if point.index - letter.index > self.rule.max_staleness:
                return {"from": None}
            parts = letter.flat.split([t.numel() for t in tensors])
            plan = self.rule.plan(point, self.memory)
            for piece, x in self.exchange.from_self(shards):
                self._update(shards[piece.tensor], piece, piece.of(parts[piece.tensor]).to(x.device), plan)
            self.memory = plan.memory
            if not point.alive[me]:
                self._replace(buffers, parts[len(shards) :])
                self.shards.reset_optimizer_state()
        return {"from": letter.sender, "age": point.index - letter.index, **plan.note}

    def _treat_optimizer_state(self, point: SyncPoint) -> None:
        if self.optimizer_state == "average":
            self._average_moments(point)
        elif self.optimizer_state == "reset" or not point.alive[self.exchange.particle]:
            self.shards.reset_optimizer_state()

    def _average_moments(self, point: SyncPoint) -> None:
        """The moments of every particle, the dead included, become the mean of those of the living."""
        moments = self.shards.moments()
        alike = len({row[0] for row in self.exchange.all_gather([float(len(moments))])}) == 1  # peers, not mates
        if not all(row[0] for row in self.world.particle_gather([float(alike)])):
            # A particle whose every step was skipped has none yet.
            if not point.alive[self.exchange.particle]:
                self.shards.reset_optimizer_state()
            return
        for piece, received in self.exchange.weighted_mean(moments, point.mean_weights()):
            piece.of(moments[piece.tensor]).copy_(received)
        self.shards.publish_moments()

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

    # -- for evaluation, export and checkpoints ---------------------------------------------

    @contextlib.contextmanager
    def holding(self, which: Literal["consensus", "best"]) -> Iterator[None]:
        """Inside the block the working weights are those that ``collect`` returns. Called on all ranks."""
        shards = self.shards.tensors
        with self._flat_buffers() as buffers:
            targets = [*shards, *buffers]
            own = [t.clone() for t in targets]
            model, flat = self.collect(which)
            self._replace(targets, [*model, *flat])
            del model, flat
        try:
            self.shards.publish()
            yield
        finally:
            with self._flat_buffers() as buffers:
                self._replace([*shards, *buffers], own)
            self.shards.publish()

    @staticmethod
    def _replace(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks of a particle, or small; JSON values."""
        return {
            "rule_memory": self.memory,
            "lr_factor": self.shards.lr_factor,
            "last_losses": self.losses,
            "totals": asdict(self.totals),
            "pending": None if self.pending is None else self.pending.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], movement: Sequence[Tensor] = ()) -> None:
        """``movement``: of the meeting that was pending, if there was one."""
        targets = [*self.shards.tensors, *(buffer for _, buffer in self.shards.buffers())]
        on_device = [values.to(t.device) for t, values in zip(targets, movement, strict=False)]
        self.pending = None
        if state["pending"]:
            self.pending = Pending(movement=on_device, settled_s=self.world.settled_s, **state["pending"])
        self.memory = state["rule_memory"]
        self.shards.lr_factor = state["lr_factor"]
        self.losses = tuple(state["last_losses"])
        self.totals = SyncTotals(**state["totals"])

    def collect(self, which: Literal["consensus", "best"]) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the shards and flat buffers of the model, or of the best particle.

        The model is the mean of the finite particles, or what the rule keeps for it (``Rule.model_in``).

        Raises:
            ConfigError: no particle has finite weights.
        """
        self.shards.zero_padding()
        finite = all(row[0] for row in self.world.particle_gather([float(self.shards.all_finite())]))
        alive = tuple(bool(row[0]) for row in self.exchange.all_gather([float(finite)]))
        if not any(alive):
            raise ConfigError("no particle has finite weights, so there is no model; resume an older checkpoint")
        losses = self.exchange.all_gather([self.losses[self.exchange.particle]])  # asynchronous: each knows its own
        point = SyncPoint(self.totals.count, tuple(row[0] for row in losses), alive)
        weights = point.best_weights() if which == "best" else point.mean_weights()
        models = self.shards.tensors
        if which == "consensus" and self.rule.model_in != "x":
            models = [state[self.rule.model_in] for state in self.state]
        copies = []
        for tensors in (models, [buffer.reshape(-1) for _, buffer in self.shards.buffers()]):
            copy = [torch.empty_like(t) for t in tensors]
            for piece, received in self.exchange.weighted_mean(tensors, weights):
                piece.of(copy[piece.tensor]).copy_(received)
            copies.append(copy)
        return copies[0], copies[1]
