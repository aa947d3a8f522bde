"""What sync points of every kind share: the parts, who has come, and what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ds_pso.comm.compression import Differences, find_format
from ds_pso.comm.exchange import Exchange, fill
from ds_pso.distributed.world import World
from ds_pso.errors import SwarmError
from ds_pso.rules import Rule, SyncPoint
from ds_pso.shards import Shards
from ds_pso.shards.fragments import Fragment, cut
from ds_pso.sync.assessment import Assessor, Probe
from ds_pso.sync.consensus import Consensus
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.health import USUAL, Limits
from ds_pso.sync.pending import Pending
from ds_pso.sync.schedule import Observed, Schedule
from ds_pso.sync.update import Updater
from ds_pso.utils.offload import NO_OFFLOAD, Offload
from ds_pso.utils.step_timer import StepClock


@dataclass
class SyncTotals:
    """What the sync points have cost this rank so far.

    Attributes:
        count: of sync points.
        seconds: for which training stood still, waiting for peers included.
        waited_s: until the last peer arrived.
        overlapped_s: in the background, while training went on.
        bytes_received: by this rank.
    """

    count: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    overlapped_s: float = 0.0
    bytes_received: int = 0


class Meetings:
    """The parts, and what each kind of sync point does with them.

    Args:
        probe, rank_by: see ``Assessor``.
        schedule: decides when ``sync`` or ``begin`` is to be called, and is told what came of it.
        optimizer_state: what becomes of the optimizer's moments at a sync point.
        wire: how weights travel.
        fragments: into how many pieces a delayed sync point is cut.
        streaming: whether each of them meets by itself, in its turn.
        offload: where state lies, and in how many bits.
        limits: see ``Assessor``.
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
        schedule: Schedule,
        optimizer_state: Literal["keep", "average", "reset"] = "keep",
        wire: str = "fp32",
        fragments: int = 1,
        streaming: bool = False,
        offload: Offload = NO_OFFLOAD,
        limits: Limits = USUAL,
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.rule = rule
        self.shards = shards
        self.optimizer_state = optimizer_state
        self.fragments = fragments
        self.streaming = streaming
        self.totals = SyncTotals()
        self.schedule = schedule
        self.assessor = Assessor(
            world, exchange, shards, probe=probe, rank_by=rank_by, total=schedule.count, limits=limits
        )
        self._check_same_model()
        self._start_alike()
        differences = None if wire == "fp32" else Differences(find_format(wire), shards.tensors, offload)
        state = [
            {name: offload.keep(value, rough=name in rule.rough_state) for name, value in found.items()}
            for found in (rule.init_state(offload.near(x)) for x in shards.tensors)
        ]
        self.updater = Updater(exchange, rule, shards.segments, state, differences)
        # Of the rule: numbers that are equal on all ranks; of each fragment if they meet by themselves.
        self.memories: list[Mapping[str, Any]] = [{}] * (fragments if streaming else 1)
        self.consensus = Consensus(self.assessor, self.updater, shards)
        self.pending: Pending | None = None
        # A fragment did not meet in its turn: a particle that is not alive needs the whole model, so ``sync`` is next.
        self.needs_whole = False
        # Whether an exchange was broken off when some of the weights, or of what is kept, had been changed.
        self.is_torn = False
        self._cuts: dict[int, list[Fragment]] = {}
        self._mailbox = world.open_mailbox() if rule.max_staleness is not None else None
        self._message_bytes = 0
        self.clock = StepClock()
        self._held_up_s = 0.0  # by the last sync point

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
            fill(tensors, self.exchange.from_one(tensors, source=0))
        with self.shards.flat_buffers() as buffers:
            fill(buffers, self.exchange.from_one(buffers, source=0))
        self.shards.publish()

    def step_made(self) -> None:
        """The optimizer has taken a step."""
        self.clock.tick()

    def _publish(self, *, tentative: bool = False) -> None:
        """Show the particle's new weights to its ranks; ``tentative``: to be scored, and perhaps changed again."""
        self.shards.publish()

    def _reset_optimizer_state(self) -> None:
        self.shards.reset_optimizer_state()

    def _stay_together(self) -> None:
        """Before the ranks of a particle do something together after each has exchanged with its peers."""

    def begin_anew(self, step: int) -> None:
        """The particles are equal and have not met before: what is kept follows from the weights as they are now."""
        self.world.settle()
        self.shards.zero_padding()
        tensors = self.shards.tensors
        for kept, x in zip(self.updater.state, tensors, strict=True):
            for name, value in self.rule.init_state(x).items():
                kept[name].copy_(value)
        if self.updater.differences is not None:
            self.updater.differences.agree_on(tensors)
            for residual in self.updater.differences.residual:
                residual.zero_()
        self.memories = [{}] * len(self.memories)
        self.pending, self.needs_whole = None, False
        self.shards.lr_factor = 1.0
        self.totals = SyncTotals()
        self.assessor.losses, self.assessor.index = (math.nan,) * self.exchange.num_particles, 0
        self.schedule.begin(step)

    def _pace(self) -> tuple[float, float]:
        return self.assessor.step_s, self.assessor.held_up_s

    def _conclude(
        self,
        record: dict[str, Any],
        begun: int,
        drift: float,
        pace: tuple[float, float],
        *,
        staleness: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Count the sync point, and let the schedule know what it was like; returns the whole record."""
        self.totals.count += 1
        self.assessor.index = self.totals.count
        self._held_up_s = seconds
        self.totals.seconds += seconds
        self.totals.waited_s += record["waited_s"]
        self.totals.bytes_received += record["bytes_received"]
        self.schedule.observe(Observed(drift, *pace))
        interval = self.schedule.next_after(begun) - begun
        times = {"seconds": seconds, "step_s": pace[0]}
        return record | {"drift": drift, "staleness": staleness, "next_interval": interval, **times}

    def _own_row(self, window: FitnessWindow) -> list[float]:
        return self.assessor.own_row(
            window, step_s=self.clock.take(), held_up_s=self._held_up_s, needs_loss=self.rule.uses_fitness
        )

    def _apart(self, distances: Sequence[Sequence[float]], point: SyncPoint) -> Sequence[float]:
        """See ``Assessor.apart``; ``distances``: of each part of this rank's elements."""
        return self.assessor.apart([sum(column) for column in zip(*distances, strict=True)], point)

    def _traffic(self) -> tuple[int, float, int]:
        return self.exchange.bytes_received, self.exchange.seconds, self.exchange.repeated

    def _traffic_since(self, before: tuple[int, float, int]) -> dict[str, Any]:
        received, seconds, repeated = (now - then for now, then in zip(self._traffic(), before, strict=True))
        bandwidth = received * 8 / seconds / 1e6 if seconds > 0 else None
        found = {"bytes_received": int(received), "exchange_s": seconds, "bandwidth_mbit_s": bandwidth}
        return found | ({"repeated": int(repeated)} if repeated else {})

    def _wait_for(self, ranks: Sequence[int], *, together: bool = False) -> float:
        """Roll call; ``together``: with the local ranks. Returns its seconds."""
        begin, turn = time.perf_counter(), self.world.turn("sync")
        call = self.world.barrier_with_local_ranks if together else self.world.barrier
        call(f"sync {turn}", ranks)
        if turn > 1:  # the last one may have been of others
            self.world.forget(f"sync {turn - 2}")
        return time.perf_counter() - begin

    def _cut(self, count: int) -> list[Fragment]:
        if count not in self._cuts:
            self._cuts[count] = cut(self.shards, count)
        return self._cuts[count]
