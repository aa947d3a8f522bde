"""What the kinds of sync share on one rank: the parts, what they remember, and what they have cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ds_pso.comm.collectives import Traffic
from ds_pso.comm.compression import UNCOMPRESSED, Differences, find_format
from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.world import World
from ds_pso.metrics.records import SyncRecord
from ds_pso.rules import Rule, SyncPoint
from ds_pso.shards import Shards
from ds_pso.shards.fragments import Fragment, cut
from ds_pso.sync.assessment import Assessor, Pace, Probe
from ds_pso.sync.direction_mean import DirectionMean, matrices
from ds_pso.sync.expert_load import ExpertLoad
from ds_pso.sync.health import USUAL, Limits
from ds_pso.sync.moment_options import ALL_AT_EACH_SYNC, MomentOptions
from ds_pso.sync.moments import Moments
from ds_pso.sync.schedule import Observed, Schedule
from ds_pso.sync.update import Updater
from ds_pso.utils.offload import NO_OFFLOAD, Offload
from ds_pso.utils.strict_model import StrictModel


@dataclass(frozen=True)
class SyncOptions:
    """Options of the syncs beside those of the rule.

    Attributes:
        probe: loss on a batch that is the same for every particle.
        ranks_by_probe: whether that is the fitness.
        optimizer_state: what becomes of the optimizer's moments at a sync.
        moments: when they are averaged, and how they travel, if they are.
        wire: how weights travel.
        wire_options: of a wire that has some.
        residual: where what the wire withholds waits.
        residual_decay: what waits in the wire is multiplied by it.
        delay: optimizer steps until the result of a sync is applied; 0: training waits.
        fragments: into how many pieces a delayed sync is cut.
        streaming: whether each of them syncs by itself, in its turn.
        mixing: part of a late movement that is left out.
        offload: where state lies, and in how many bits.
        limits: beyond which a particle has diverged.
        expert_load: what counts the tokens of each expert; None: nobody does.
        section: the resolved ``swarm`` section, which must be equal on all particles.
        samples_per_step: how many this particle trains on, by which it counts in a mean; None: all count alike.
    """

    probe: Probe | None = None
    ranks_by_probe: bool = False
    optimizer_state: Literal["keep", "average", "reset"] = "keep"
    moments: MomentOptions = ALL_AT_EACH_SYNC
    wire: str = UNCOMPRESSED
    wire_options: StrictModel | None = None
    residual: Literal["wire", "weights"] = "wire"
    residual_decay: float = 1.0
    delay: int = 0
    fragments: int = 1
    streaming: bool = False
    mixing: float = 0.0
    offload: Offload = NO_OFFLOAD
    limits: Limits = USUAL
    expert_load: ExpertLoad | None = None
    section: Mapping[str, Any] = field(default_factory=dict)
    samples_per_step: Callable[[], int] | None = None


@dataclass
class SyncTotals:
    """The cost of all syncs so far, for this rank.

    Attributes:
        count: of syncs.
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


class SyncParts:
    """The parts of one rank's syncs.

    Attributes:
        moments: what is averaged of the optimizer; None: nothing.
        memories: of the rule: JSON values that are equal on all ranks; one of each fragment that syncs by itself.
        is_torn: whether an exchange was broken off when some of the weights, or of the state, had been changed.
    """

    def __init__(
        self, world: World, exchange: Exchange, rule: Rule, shards: Shards, schedule: Schedule, options: SyncOptions
    ) -> None:
        self.world = world
        self.membership = world.membership
        self.exchange = exchange
        self.rule = rule
        self.shards = shards
        self.schedule = schedule
        self.options = options
        self.assessor = Assessor(
            world,
            exchange,
            shards,
            probe=options.probe,
            ranks_by_probe=options.ranks_by_probe,
            needs_loss=rule.uses_fitness,
            total=schedule.count,
            limits=options.limits,
            samples_per_step=options.samples_per_step,
            expert_load=options.expert_load,
        )
        with shards.mapped():
            self.updater = self._build_updater()
        self.moments: Moments | None = None
        if options.optimizer_state == "average":
            self.moments = Moments(
                exchange, world.local, shards, options.moments, delays=options.delay > 0, offload=options.offload
            )
        self.memories: list[Mapping[str, Any]] = [{}] * (options.fragments if options.streaming else 1)
        self.totals = SyncTotals()
        self.is_torn = False
        self._cuts: dict[int, list[Fragment]] = {}

    def _build_updater(self) -> Updater:
        """Return the rule with state of its own and of the wire, which is made of the shards."""
        rule, exchange, shards, options = self.rule, self.exchange, self.shards, self.options
        offload = options.offload
        shards.zero_padding()
        differences = None
        if options.wire != UNCOMPRESSED:
            differences = Differences(
                find_format(options.wire, options.wire_options),
                shards.tensors,
                offload,
                in_weights=options.residual == "weights",
                decay=options.residual_decay,
            )
        state = [
            {name: offload.keep(value, rough=name in rule.rough_state) for name, value in found.items()}
            for found in (rule.init_state(offload.near(x)) for x in shards.tensors)
        ]
        direction_mean = None
        if rule.keeps_lengths_from is not None and exchange.num_particles > 1:  # one movement is as long as itself
            direction_mean = DirectionMean(exchange, self.world.local, shards.segments, matrices(shards))
        return Updater(exchange, rule, shards.segments, state, differences, direction_mean)

    def fragments(self, count: int) -> list[Fragment]:
        """Return this rank's part of each of so many fragments of the model."""
        if count not in self._cuts:
            self._cuts[count] = cut(self.shards, count)
        return self._cuts[count]

    def traffic_since(self, before: Traffic) -> dict[str, Any]:
        """Return what a ``SyncRecord`` says of the bytes that have moved since then."""
        now = self.exchange.traffic
        received, seconds = now.bytes_received - before.bytes_received, now.seconds - before.seconds
        return {
            "bytes_received": received,
            "exchange_s": seconds,
            "bandwidth_mbit_s": received * 8 / seconds / 1e6 if seconds > 0 else math.nan,
            "repeated": now.repeated - before.repeated,
        }

    def record_of(self, point: SyncPoint, before: Traffic) -> SyncRecord:
        """Begin the record of a sync: what was agreed on at its beginning, and what has moved since ``before``."""
        # Names of a JSON object are strings; so the record is the same before and after a checkpoint.
        left_out = {str(i): reason for i, reason in point.left_out.items()}
        record = SyncRecord(point.index, point.fitness, point.alive, left_out, **self.traffic_since(before))
        return replace(
            record,
            same_samples=self.assessor.same_samples,
            expert_load_distances=self.assessor.expert_load_distances,
        )

    def conclude(self, record: SyncRecord, begun: int, pace: Pace, *, counts: bool = True) -> SyncRecord:
        """Count a sync, let the schedule know what it was like, and complete its record.

        Args:
            begun: the optimizer step at which it began.
            counts: whether it came to its end.
        """
        if counts:
            self.totals.count += 1
        self.assessor.index = self.totals.count
        self.assessor.held_up_s = record.seconds
        self.totals.seconds += record.seconds
        self.totals.waited_s += record.waited_s
        self.totals.overlapped_s += record.overlapped_s
        self.totals.bytes_received += record.bytes_received
        self.schedule.observe(Observed(record.drift, pace.step_s, pace.held_up_s))
        interval = self.schedule.next_after(begun) - begun
        return replace(record, next_interval=interval, step_s=pace.step_s)

    def moment_residuals(self, *, prepare: bool = False) -> list[Tensor]:
        """Return what rounding has taken from the optimizer's moments so far, live.

        Args:
            prepare: have them, where they are needed, from now on.
        """
        if self.moments is None:
            return []
        if prepare:
            self.moments.prepare()
        return list(self.moments.residuals().values())

    def start_state(self) -> None:
        """Let the state of rule and wire follow from the weights as they are, which are equal on all particles."""
        with self.shards.mapped(writes=False):
            for kept, x in zip(self.updater.state, self.shards.tensors, strict=True):
                for name, value in self.rule.init_state(x).items():
                    kept[name].copy_(value)
        self.memories = [{}] * len(self.memories)
        self.start_wire()

    def start_wire(self) -> None:
        """Let what the wire keeps follow from the weights as they are, which are equal on all particles."""
        if self.updater.differences is not None:
            with self.shards.mapped(writes=False):
                self.shards.zero_padding()
                self.updater.differences.agree_on(self.shards.tensors)
            for residual in self.updater.differences.residual:
                residual.zero_()
        for residual in self.moment_residuals():
            residual.zero_()
