"""Syncs in the background: begun after one optimizer step, and applied after later ones."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ds_pso.comm.collectives import Traffic
from ds_pso.errors import PeerError, SwarmError
from ds_pso.metrics.records import SyncRecord
from ds_pso.rules import SyncPoint
from ds_pso.shards import replace as replace_all
from ds_pso.shards.fragments import Fragment
from ds_pso.sync.assessment import UNKNOWN_PACE, Pace
from ds_pso.sync.buffers import average
from ds_pso.sync.fitness import NO_LOSSES, FitnessWindow, ParticleReport, WindowState
from ds_pso.sync.moment_options import Kind
from ds_pso.sync.moments import Moment, Moments
from ds_pso.sync.parts import SyncParts
from ds_pso.sync.rollback import Snapshot, residuals, shared_state
from ds_pso.utils.device import wait_for_device

_SAVED = ("begun", "delay", "cut_into", "numbers", "applied", "held_up_s", "background_s")
_ALSO_SAVED = ("broken_off", "lr_factors", "window", "distances", "arrived_s", "kinds", "skipped")


@dataclass
class PendingSync:
    """A sync that goes on while training does.

    Attributes:
        begun: optimizer step.
        delay: steps until the last fragment is due.
        cut_into: fragments that the model consists of.
        numbers: of those that are on their way.
        movement: copies of this rank's ranges of the fragments, one after the other, and of the flat buffers, as they
            were at the beginning. In the end: how far they shall move, or where they shall be if the particle was not
            alive; and the mean of the buffers, which are statistics (a variance that was corrected could become
            negative).
        kinds: of the optimizer's moments that are on their way, too.
        moments: of these kinds, as they were at the beginning, and in the end how far they shall move.
        num_moments: see ``Moments.count``.
        skipped: optimizer steps that had been skipped at the beginning.
        applied: fragments.
        record: what is known of the sync so far.
        broken_off: a particle was lost, or needs the whole model: nothing comes of it.
        window: what ``FitnessWindow.state`` said before it was emptied.
        distances: see ``Assessor.distances``.
        arrived_s: of each fragment, after the beginning.
        held_up_s: for which training was held up, to begin it and to apply what has come.
        settled_s: what ``Background.settled_s`` was at the beginning.
        waited_s: what that has grown by in ``held_up_s``.
        arrived: set when a fragment has come.
    """

    begun: int
    delay: int
    cut_into: int
    numbers: Sequence[int]
    movement: list[Tensor]
    settled_s: float
    record: SyncRecord
    kinds: Sequence[Kind] = ()
    moments: list[Moment] = field(default_factory=list)
    num_moments: float = 0.0
    skipped: int = 0
    applied: int = 0
    broken_off: bool = False
    lr_factors: Sequence[float] = ()
    window: WindowState = NO_LOSSES
    distances: Sequence[float] = (0.0, 0.0)
    pace: Pace = UNKNOWN_PACE
    arrived_s: list[float] = field(default_factory=list)
    held_up_s: float = 0.0
    background_s: float = 0.0
    waited_s: float = 0.0
    arrived: list[threading.Event] = field(default_factory=list)

    @property
    def fragments(self) -> int:
        """How many are on their way."""
        return len(self.numbers)

    @property
    def is_void(self) -> bool:
        """True if nothing is applied: broken off, or a fragment that has to wait for a sync of the whole model."""
        return self.broken_off or bool(self.record.abandoned)

    def due(self, fragment: int) -> int:
        """Return the optimizer step after which a fragment is applied: spread over the delay."""
        return self.begun + math.ceil(self.delay * (fragment + 1) / self.fragments)

    def due_by(self, step: int) -> int:
        """Return how many fragments are due."""
        return sum(step >= self.due(fragment) for fragment in range(self.fragments))

    def state_dict(self) -> dict[str, Any]:
        """Return all but the tensors, once the exchange is over; JSON values."""
        values = {name: getattr(self, name) for name in (*_SAVED, *_ALSO_SAVED)}
        return values | {"record": asdict(self.record), "pace": asdict(self.pace)}


class Overlap:
    """Works on copies of the shards, in a thread, while the particle's own ranks go on training.

    Attributes:
        pending: the sync that is on its way, if one is.
        needs_whole: a sync came to nothing, so that the next one is of the whole model, and waited for.
    """

    def __init__(self, parts: SyncParts) -> None:
        self._parts = parts
        self.pending: PendingSync | None = None
        self.needs_whole = False

    def begin(self, window: FitnessWindow, step: int) -> None:
        """Begin to exchange in the background, and empty the window. Called alike on all ranks.

        Args:
            step: the optimizer step that has just been made; ``advance`` is to be called after the following ones.

        Raises:
            As ``Synchronizer.sync`` does.
        """
        assert self.pending is None, "finish what is pending first"
        parts, options = self._parts, self._parts.options
        parts.shards.check_ready()
        begin = time.perf_counter()
        parts.schedule.begin(step)
        parts.membership.wait_for_local_ranks()
        kinds = () if parts.moments is None else parts.moments.due(parts.assessor.index)
        numbers: Sequence[int] = range(options.fragments)
        if options.streaming:
            numbers = [parts.schedule.fragment_at(step, options.fragments)]
        with parts.shards.mapped(writes=False):
            parts.shards.zero_padding()
            report, losses = parts.assessor.report(window), window.state()
            window.clear()
            pending = self.pending = PendingSync(
                step,
                options.delay,
                options.fragments,
                list(numbers),
                [],
                settled_s=parts.world.background.settled_s,
                record=SyncRecord(parts.assessor.index, (), ()),
                kinds=kinds,
                skipped=parts.shards.engine.skipped_steps,
                window=losses,
                arrived=[threading.Event() for _ in numbers],
            )
            pending.movement = [t.clone() for t in self._touched(pending)]
            if parts.moments is not None and kinds:
                # In the background the particle's own ranks cannot talk to each other; peers compare numbers there.
                pending.num_moments = parts.moments.count()
                parts.moments.check(min(row[0] for row in parts.world.local.gather([pending.num_moments])))
                parts.moments.prepare()
                pending.moments = [moment.copied() for moment in parts.moments.of(kinds)]
        pending.held_up_s = time.perf_counter() - begin
        parts.world.background.run(lambda: self._exchange(pending, report))

    def _exchange(self, pending: PendingSync, report: ParticleReport) -> None:
        """Do in the background what peers do together; the particle's own ranks are busy training."""
        parts, membership, updater = self._parts, self._parts.membership, self._parts.updater
        begin, before = time.perf_counter(), replace(parts.exchange.traffic)
        memories, pace, highest = list(parts.memories), parts.assessor.pace, parts.assessor.highest_loss
        kept = [*shared_state(updater), *residuals(updater), *parts.moment_residuals()]
        snapshot = Snapshot(kept) if membership.can_fail else None
        error = None
        try:
            quorum = membership.start_quorum(parts.assessor.index, in_background=True)
            if quorum.recovering or quorum.overdue or quorum.is_mixed:
                self._break_off(pending, before)
                return
            point = parts.assessor.gather(report, parts.schedule.progress(pending.begun))
            pending.pace = parts.assessor.pace
            # Whoever waits for the first fragment reads it.
            pending.record = replace(parts.record_of(point, before), waited_s=membership.waited_s)
            if membership.can_fail:
                pending.record = replace(pending.record, present=quorum.present, recovered=())
            if parts.options.streaming:
                abandoned = not all(point.alive)
                pending.record = replace(pending.record, fragment=pending.numbers[0], abandoned=abandoned)
            if parts.assessor.frozen_differs:  # training uses it meanwhile
                pending.record = replace(pending.record, abandoned=True)
            if any(point.alive) and not pending.is_void:
                parts.is_torn = True
                note = self._move(pending, point, begin)
                parts.is_torn = False
                pending.record = replace(pending.record, note=note)
        except PeerError as failure:
            error = failure
        if not membership.should_commit(error):
            assert snapshot is not None
            snapshot.restore()
            parts.memories, parts.is_torn = memories, False
            parts.assessor.pace, parts.assessor.highest_loss = pace, highest
            self._break_off(pending, before)
            return
        pending.record = replace(pending.record, **parts.traffic_since(before))
        pending.background_s = time.perf_counter() - begin

    def _break_off(self, pending: PendingSync, before: Traffic) -> None:
        """Let nothing come of it. The whole model is synced next."""
        parts = self._parts
        alive = [particle in parts.exchange.present for particle in range(parts.exchange.num_particles)]
        record = SyncRecord(parts.assessor.index, parts.assessor.losses, alive, abandoned=True)
        pending.record = replace(record, waited_s=parts.membership.waited_s, **parts.traffic_since(before))
        # Some ranks may have seen more of it than others: the schedule learns nothing from it.
        pending.broken_off, pending.distances, pending.pace, pending.lr_factors = True, (0.0, 0.0), UNKNOWN_PACE, ()

    def _move(self, pending: PendingSync, point: SyncPoint, begin: float) -> Mapping[str, Any]:
        """Turn the copies into what ``PendingSync.movement`` says, one fragment after the other.

        Returns:
            What the rule noted.
        """
        parts = self._parts
        copies, buffers = self._split(pending)
        if buffers:
            average(parts.exchange, buffers, point.mean_weights())
        memory = pending.numbers[0] if parts.options.streaming else 0
        plan = parts.rule.plan(point, parts.memories[memory])
        if plan.score:
            raise SwarmError(
                "swarm.delay: the rule scores weights before it settles, and training has gone on meanwhile; let its "
                "uses_probe be true, so that this is said at once, or use 0",
                agreed=True,
            )
        note: Mapping[str, Any] = {}
        squares = []
        for fragment, own, arrived in zip(self._fragments_of(pending), copies, pending.arrived, strict=True):
            updater = parts.updater.of(fragment)
            note = updater.displace(plan, own, alive=point.alive[parts.exchange.particle])
            squares.append(updater.take_distance())
            wait_for_device()  # who waits for it goes on at once, on another stream
            pending.arrived_s.append(time.perf_counter() - begin)
            arrived.set()
        self._move_moments(pending, point)
        parts.memories[memory] = plan.memory
        pending.lr_factors = plan.lr_factors
        pending.distances = parts.assessor.distances([sum(column) for column in zip(*squares, strict=True)], point)
        return note

    def _move_moments(self, pending: PendingSync, point: SyncPoint) -> None:
        """Turn the copies of the optimizer's moments into how far these shall move."""
        parts = self._parts
        if parts.moments is None or not pending.kinds:
            return
        if not parts.moments.agree_with_peers(pending.num_moments):  # one whose every step was skipped has none yet
            pending.kinds, pending.moments = (), []
            return
        before = [moment.tensor.clone() for moment in pending.moments]
        parts.moments.mean_of(pending.moments, point.mean_weights())
        for moment, own in zip(pending.moments, before, strict=True):
            moment.tensor.sub_(own)
        wait_for_device()

    def _fragments_of(self, pending: PendingSync) -> list[Fragment]:
        return [self._parts.fragments(pending.cut_into)[number] for number in pending.numbers]

    def _touched(self, pending: PendingSync) -> list[Tensor]:
        """Return what the sync is about, in the order of ``PendingSync.movement``."""
        shards = self._parts.shards.tensors
        ranges = [r.of(shards) for fragment in self._fragments_of(pending) for r in fragment]
        return [*ranges, *(buffer.reshape(-1) for _, buffer in self._parts.shards.buffers())]

    def _split(self, pending: PendingSync) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Split ``PendingSync.movement``: of each fragment the tensors of its ranges; and those of the buffers."""
        tensors = iter(pending.movement)
        ranges = [[next(tensors) for _ in fragment] for fragment in self._fragments_of(pending)]
        return ranges, list(tensors)

    def advance(self, window: FitnessWindow, step: int, *, to_the_end: bool = False) -> SyncRecord | None:
        """Apply what is due of the pending sync, and wait for it if need be. Called alike on all ranks.

        The correction of multi-step delayed updates, x <- result + (x now - x when it began), with ``mixing`` alpha:
        x now <- x now + (1 - alpha) (result - x when it began).

        A particle that was not alive then takes everything as soon as something is due, and ``window`` forgets losses
        and steps since then, which were those of weights that are gone now.

        Args:
            to_the_end: also what is not due yet.

        Returns:
            The record, once all is applied.

        Raises:
            As ``Synchronizer.sync`` does.
        """
        pending = self.pending
        if pending is None:
            return None
        parts, background = self._parts, self._parts.world.background
        parts.shards.check_ready()
        begin = time.perf_counter()
        end = pending.fragments if to_the_end else pending.due_by(step)
        if end == 0:
            return None
        settled_before = background.settled_s
        if pending.arrived and end < pending.fragments:
            background.wait(pending.arrived[end - 1])
        else:
            background.settle()
        if pending.is_void:
            window.give_back(*pending.window)
            self.needs_whole = True
        elif pending.applied < end:
            with parts.shards.mapped():
                self._apply(pending, end, window, step)
                parts.shards.publish()
        pending.waited_s += background.settled_s - settled_before
        if end < pending.fragments:
            pending.held_up_s += time.perf_counter() - begin
            return None

        self.pending = None
        parts.assessor.losses = tuple(pending.record.losses)
        waited = background.settled_s - pending.settled_s
        due: Sequence[int] = ()
        if pending.fragments > 1:
            due = [min(step, pending.due(fragment)) - pending.begun for fragment in range(pending.fragments)]
        record = replace(
            pending.record,
            drift=parts.assessor.drift(pending.distances),
            moments=() if pending.is_void or not any(pending.record.alive) else pending.kinds,
            staleness=step - pending.begun,
            # An evaluation or a checkpoint may have had to wait for it before.
            seconds=pending.held_up_s + waited - pending.waited_s + time.perf_counter() - begin,
            overlapped_s=max(0.0, pending.background_s - waited),
            fragments_staleness=due,
            fragments_s=pending.arrived_s if due else (),
        )
        # Where it was broken off, others may have got through: then this particle recovers next.
        return parts.conclude(record, pending.begun, pending.pace, counts=not pending.broken_off)

    def _apply(self, pending: PendingSync, end: int, window: FitnessWindow, step: int) -> None:
        """Make the movement of the fragments before ``end``, and with the last one what is not theirs."""
        parts, me = self._parts, self._parts.exchange.particle
        shards, alive = parts.shards.tensors, pending.record.alive
        moved, mean = self._split(pending)
        if not alive[me]:
            # Half a particle would not live either.
            parts.world.background.settle()
            end = pending.fragments
            window.clear()
        if any(alive):
            fragments = self._fragments_of(pending)
            for number in range(pending.applied, end):
                for r, movement in zip(fragments[number], moved[number], strict=True):
                    if alive[me]:
                        r.of(shards).add_(movement, alpha=1 - parts.options.mixing)
                    else:
                        r.of(shards).copy_(movement)
        if any(alive) and end == pending.fragments:
            with parts.shards.flat_buffers() as buffers:
                replace_all(buffers, mean)
            if pending.lr_factors:
                parts.shards.lr_factor = pending.lr_factors[me]
                pending.record = replace(pending.record, lr_factors=pending.lr_factors)
            if parts.options.optimizer_state == "reset" or not alive[me]:
                parts.shards.reset_optimizer_state()
            elif parts.moments is not None and parts.moments.due(pending.record.sync):
                self._apply_moments(parts.moments, pending, step)
        pending.applied = end

    def _apply_moments(self, moments: Moments, pending: PendingSync, step: int) -> None:
        """Make the movement of the optimizer's moments, if it has come to all ranks of the particle."""
        parts = self._parts
        if not all(row[0] for row in parts.world.local.gather([float(bool(pending.kinds))])):
            pending.kinds = ()
            return
        skipped = parts.shards.engine.skipped_steps - pending.skipped
        moments.add_late(pending.moments, step - pending.begun - skipped)
        parts.shards.publish_moments()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what is pending, without its tensors; JSON values."""
        return None if self.pending is None else self.pending.state_dict()

    def load_state_dict(
        self, state: Mapping[str, Any] | None, movement: Sequence[Tensor] = (), moments: Sequence[Tensor] = ()
    ) -> None:
        """Go on from there.

        Args:
            movement: see ``PendingSync``.
            moments: likewise.
        """
        self.pending = None
        if not state:
            return
        state = {**state, "record": SyncRecord(**state["record"]), "pace": Pace(**state["pace"])}
        pending = PendingSync(movement=[], settled_s=self._parts.world.background.settled_s, **state)
        with self._parts.shards.mapped(writes=False):
            pending.movement = [values.to(t) for t, values in zip(self._touched(pending), movement, strict=True)]
            if self._parts.moments is None or not moments:
                pending.kinds = ()
            else:
                places = self._parts.moments.of(pending.kinds)
                pending.moments = [
                    replace(place, tensor=values.to(place.tensor))
                    for place, values in zip(places, moments, strict=True)
                ]
        self.pending = pending
