"""The order of things at a sync: a quorum, recovery, agreement on fitness, the rule, a commit, and the new weights."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ds_pso.comm.collectives import Traffic
from ds_pso.distributed.membership import Quorum
from ds_pso.errors import PeerError
from ds_pso.metrics.records import SyncRecord
from ds_pso.rules import SyncPoint
from ds_pso.sync.buffers import average
from ds_pso.sync.consensus import Consensus
from ds_pso.sync.fitness import FitnessWindow, ParticleReport
from ds_pso.sync.gossip import Gossip
from ds_pso.sync.moment_options import KINDS, Kind
from ds_pso.sync.moments import Moments
from ds_pso.sync.overlapped import Overlap
from ds_pso.sync.parts import SyncParts, SyncTotals
from ds_pso.sync.recovery import Progress, Recovery
from ds_pso.sync.rollback import Snapshot, residuals, shared_state
from ds_pso.utils.device import wait_for_device

_ATTEMPTS = 20  # each without somebody who was lost in the one before
_PAUSE_S = 0.2


@dataclass
class _Attempt:
    """A sync that this rank has got through, and that has still to be committed.

    Attributes:
        quorum: None where nobody waits for the others.
        point: None at the start of a swarm.
        moments: kinds of the optimizer's moments that were averaged.
        resets: whether the optimizer begins anew.
        distances: see ``Assessor.distances``.
        restored: see ``SyncRecord``.
        begin: when it began; after a recovery, which is no part of it.
        before: what had moved by then.
    """

    step: int
    begin: float
    before: Traffic
    quorum: Quorum | None = None
    point: SyncPoint | None = None
    note: Mapping[str, Any] = field(default_factory=dict)
    lr_factors: Sequence[float] = ()
    moments: tuple[Kind, ...] = ()
    resets: bool = False
    distances: Sequence[float] = (0.0, 0.0)
    restored: Mapping[str, str] = field(default_factory=dict)


class Synchronizer:
    """Syncs this rank with its peers. It knows the order of things, and leaves each of them to a part.

    Attributes:
        parts: what the kinds of sync share.
        overlap: syncs in the background.
        recovery: gives state to particles that lack it.
        gossip: syncs that wait for nobody; None: the rule waits.
        consensus: the model that the particles are together.
    """

    def __init__(self, parts: SyncParts, progress: Progress) -> None:
        self.parts = parts
        self.overlap = Overlap(parts)
        self.recovery = Recovery(parts, progress, self)
        self.consensus = Consensus(parts)
        self.gossip: Gossip | None = None
        self._spent_s = 0.0  # by the last ``after_step``

    def start(self, window: FitnessWindow, step: int) -> None:
        """Take part in the swarm: begin with the weights of particle 0, or with the state of one that is running.

        Called alike on all ranks.

        Raises:
            SwarmError: the particles hold different models.
            PeerError: somebody did not come.
        """
        parts = self.parts
        parts.world.background.settle()
        self.overlap.pending = None  # weights that were loaded since do not move by it
        parts.membership.introduce(parts.shards.fingerprint(), parts.options.section)
        self.sync(window, step)
        if parts.rule.max_staleness is not None:
            self.gossip = Gossip(parts, parts.world.open_mailbox(), parts.rule.max_staleness)

    def after_step(self, window: FitnessWindow, step: int, has_ended: Callable[[SyncRecord], None]) -> None:
        """Do what is due after an optimizer step.

        Args:
            has_ended: called with the record of each sync as soon as it has ended: the next may fail.

        Raises:
            As ``sync`` does.
        """
        parts, overlap = self.parts, self.overlap
        if overlap.needs_whole or parts.schedule.is_due(step):
            wait_for_device()  # or what a GPU has still to do for the step would count as time of the sync
        begin = time.perf_counter()
        parts.assessor.timer.tick(begin, self._spent_s)
        parts.membership.heartbeat()
        if overlap.pending is not None:
            self._deliver(overlap.advance(window, step), has_ended)
        if overlap.needs_whole or parts.schedule.is_due(step):
            if overlap.pending is not None:
                # After resuming with a shorter interval it may begin before the last one is due.
                self._deliver(overlap.advance(window, step, to_the_end=True), has_ended)
            if self._waits(step):
                self._deliver(self.sync(window, step), has_ended)
            else:
                overlap.begin(window, step)
        self._spent_s = time.perf_counter() - begin  # callbacks included: they are no part of an optimizer step

    @staticmethod
    def _deliver(record: SyncRecord | None, has_ended: Callable[[SyncRecord], None]) -> None:
        if record is not None:
            has_ended(record)

    def _waits(self, step: int) -> bool:
        parts = self.parts
        if parts.options.delay == 0 or self.overlap.needs_whole:
            return True
        return parts.schedule.in_warmup(step) or parts.schedule.progress(step) == 1

    def sync(self, window: FitnessWindow, step: int) -> SyncRecord | None:
        """Sync now, while training waits, and empty the window. Called alike on all ranks.

        Where a particle is lost meanwhile, and the membership allows it, those who are left try again.

        Args:
            step: the optimizer step that has just been made.

        Returns:
            The record; None at the start of a swarm, when all take the weights of one.

        Raises:
            PeerError: somebody did not come within the timeout, and names who; or too few particles are left.
            SwarmError: the shards were offloaded, or the rule needs a loss and saw none.
        """
        assert self.overlap.pending is None, "finish what is pending first"
        with self.parts.shards.mapped():
            return self._sync(window, step)

    def _sync(self, window: FitnessWindow, step: int) -> SyncRecord | None:
        parts, membership = self.parts, self.parts.membership
        for _ in range(_ATTEMPTS):
            snapshot = Snapshot(self._all_tensors(), window, self.state_dict()) if membership.can_fail else None
            attempt, error = _Attempt(step, time.perf_counter(), replace(parts.exchange.traffic)), None
            try:
                self._try(attempt, window)
            except PeerError as failure:
                error = failure
            if membership.should_commit(error):
                return self._commit(attempt, window)
            assert snapshot is not None
            self._roll_back(snapshot, error)
        raise PeerError(
            f"particle {parts.exchange.particle}: {_ATTEMPTS} attempts to sync have failed, each because a particle "
            "was lost meanwhile; look at the network and at the logs of the others",
            agreed=True,
        )

    def _try(self, attempt: _Attempt, window: FitnessWindow) -> None:
        """Do all that may fail; nothing of it counts before the commit."""
        parts = self.parts
        parts.shards.prepare()
        recovers = False
        if self.gossip is None:
            quorum = parts.membership.start_quorum(parts.assessor.index)
            while quorum.is_mixed:  # the others have learned from it that somebody waits
                time.sleep(_PAUSE_S)
                quorum = parts.membership.start_quorum(parts.assessor.index)
            attempt.quorum = quorum
            if quorum.is_start or quorum.recovering or quorum.overdue:
                attempt.step = self.recovery.recover(quorum, window, attempt.step)
                attempt.begin = time.perf_counter() - parts.membership.waited_s
                attempt.before = replace(parts.exchange.traffic)
                recovers = parts.exchange.particle in quorum.recovering
            if quorum.is_start:
                return
        self.overlap.needs_whole = False
        done = parts.schedule.begin(attempt.step)
        if self.gossip is not None:
            point = attempt.point = parts.assessor.alone(parts.assessor.report(window), done)
            attempt.note = self.gossip.sync(point)
            attempt.distances = parts.updater.take_distance()  # of this particle alone
            return
        mine = ParticleReport.of_recovering() if recovers else parts.assessor.report(window)
        point = attempt.point = parts.assessor.gather(mine, done)
        if parts.assessor.frozen_differs:
            attempt.restored = self._restore_frozen()
        if any(point.alive):
            parts.is_torn = True
            squares = self._follow_rule(attempt, point)
            attempt.distances = parts.assessor.distances(squares, point)
            parts.is_torn = False

    def _restore_frozen(self) -> dict[str, str]:
        """Return what was given back, for the record; where it was lost on other ranks, its name is not known here."""
        given = self.recovery.restore_frozen()
        found = {}
        for particle in sorted({*given, *self.parts.assessor.changed}):
            names = given.get(particle, ())
            what = f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else "a tensor"
            found[str(particle)] = f"{what}, which is not trained, had changed; it is that of the others again"
        return found

    def _follow_rule(self, attempt: _Attempt, point: SyncPoint) -> list[float]:
        """Carry out the rule's plans, one after the other; return what ``Updater.take_distance`` says, summed."""
        parts, options, note, distances = self.parts, self.parts.options, dict[str, Any](), []
        if parts.shards.has_buffers:
            with parts.shards.flat_buffers() as buffers:
                average(parts.exchange, buffers, point.mean_weights())
        shards = parts.shards.tensors
        pieces = [(parts.updater, shards)]
        if options.streaming:
            fragments = parts.fragments(options.fragments)
            pieces = [(parts.updater.of(fragment), [r.of(shards) for r in fragment]) for fragment in fragments]
        for number, (updater, x) in enumerate(pieces):
            plan = parts.rule.plan(point, parts.memories[number])
            note |= updater.carry_out(plan, x)
            while plan.score:
                parts.membership.confirm_local_ranks()
                parts.shards.publish()
                plan = parts.rule.proceed(plan, parts.assessor.score())
                note |= updater.carry_out(plan, x)
            parts.memories[number] = plan.memory
            distances.append(updater.take_distance())
        if plan.lr_factors:
            parts.shards.lr_factor = plan.lr_factors[parts.exchange.particle]
            attempt.lr_factors = plan.lr_factors
        attempt.note = note
        alive = point.alive[parts.exchange.particle]
        attempt.resets = options.optimizer_state == "reset" or not alive
        if parts.moments is not None:
            attempt.moments = self._average_moments(parts.moments, point)
            attempt.resets = not alive and attempt.moments != KINDS
        return [sum(column) for column in zip(*distances, strict=True)]

    def _average_moments(self, moments: Moments, point: SyncPoint) -> tuple[Kind, ...]:
        """Let the moments of every particle, the dead included, become the mean of those of the living.

        Returns:
            Those that were due, and that all had.

        Raises:
            SwarmError: the optimizer keeps what has no mean.
        """
        due = moments.due(point.index)
        if not due or not moments.agree():
            return ()
        moments.average(due, point.mean_weights())
        return due

    def _commit(self, attempt: _Attempt, window: FitnessWindow) -> SyncRecord | None:
        """Let the result count, for the particle's own ranks and for training."""
        parts, point = self.parts, attempt.point
        recovers = self.recovery.received is not None and self.recovery.commit()
        if attempt.moments:
            parts.shards.publish_moments()
        if recovers or attempt.resets:
            parts.shards.reset_optimizer_state()
        parts.shards.publish()
        if point is None:
            return None
        window.clear()
        parts.assessor.losses = point.fitness
        drift = parts.assessor.drift(attempt.distances)
        present = recovered = None
        if attempt.quorum is not None and parts.membership.can_fail:
            present, recovered = attempt.quorum.present, attempt.quorum.recovering
        record = replace(
            parts.record_of(point, attempt.before),
            drift=drift,
            seconds=time.perf_counter() - attempt.begin,
            waited_s=0.0 if attempt.quorum is None else parts.membership.waited_s,
            lr_factors=attempt.lr_factors,
            present=present,
            recovered=recovered,
            restored=attempt.restored,
            moments=attempt.moments,
            note=attempt.note,
        )
        return parts.conclude(record, attempt.step, parts.assessor.pace)

    def _all_tensors(self) -> list[Tensor]:
        shards, updater = self.parts.shards, self.parts.updater
        moments = shards.moments() if self.parts.moments is not None else []
        buffers = [buffer for _, buffer in shards.persistent_buffers()]
        wire = [*residuals(updater), *self.parts.moment_residuals(prepare=True)]
        return [*shards.tensors, *buffers, *moments, *shared_state(updater), *wire]

    def _roll_back(self, snapshot: Snapshot, error: PeerError | None) -> None:
        parts = self.parts
        snapshot.restore()
        parts.shards.store()
        parts.updater.take_distance()
        self.recovery.received = None
        self.load_state_dict(snapshot.numbers)
        parts.is_torn = False
        if parts.world.is_leader:
            why = error or "a peer was lost before it could commit"
            warnings.warn(f"sync point {parts.assessor.index} was broken off: {why}", stacklevel=2)

    def finish_pending(self, window: FitnessWindow, step: int) -> SyncRecord | None:
        """Apply now what a sync in the background still has to bring, if one is pending; returns its record."""
        return self.overlap.advance(window, step, to_the_end=True)

    def begin_anew(self, step: int) -> None:
        """Forget all syncs: the particles are equal, and what is remembered follows from the weights as they are."""
        parts = self.parts
        parts.world.background.settle()
        with parts.shards.mapped():
            parts.shards.zero_padding()
            parts.start_state()
        self.overlap.pending, self.overlap.needs_whole = None, False
        parts.shards.lr_factor = 1.0
        parts.totals = SyncTotals()
        parts.assessor.losses, parts.assessor.index = (math.nan,) * parts.exchange.num_particles, 0
        parts.schedule.begin(step)

    def reloaded(self) -> None:
        """Take note that the model is that of a checkpoint; all of it is compared at the next sync."""
        self.parts.shards.reloaded()
        self.parts.shards.frozen.remember()
        self.parts.assessor.compares_all = True

    def state_dict(self) -> dict[str, Any]:
        """Return what is equal on all ranks of a particle, or small; JSON values."""
        parts = self.parts
        return {
            "rule_memories": parts.memories,
            "lr_factor": parts.shards.lr_factor,
            "last_losses": parts.assessor.losses,
            "highest_loss": parts.assessor.highest_loss,
            "norm_limit": parts.options.limits.norm,  # for who reads the checkpoint without a swarm
            "totals": asdict(parts.totals),
            "schedule": parts.schedule.state_dict(),
            "held_up_s": parts.assessor.held_up_s,
            "step_s": parts.assessor.pace.step_s,
            "pending": self.overlap.state_dict(),
            # Of this rank, for who reads the checkpoint without a swarm.
            "odd_by_design": parts.shards.odd_by_design,
            "own_frozen": sorted(parts.shards.frozen.own),
            **parts.membership.state_dict(),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], movement: Sequence[Tensor] = (), moments: Sequence[Tensor] = ()
    ) -> None:
        """Go on from there.

        Args:
            movement: of the sync that was pending, if there was one.
            moments: likewise, of the optimizer's moments.
        """
        parts = self.parts
        self.overlap.load_state_dict(state["pending"], movement, moments)
        parts.memories = list(state["rule_memories"])
        parts.shards.lr_factor = state["lr_factor"]
        parts.assessor.losses = tuple(state["last_losses"])
        parts.assessor.highest_loss = state["highest_loss"]
        parts.totals = SyncTotals(**state["totals"])
        parts.assessor.index = parts.totals.count
        parts.schedule.load_state_dict(state["schedule"])
        parts.assessor.held_up_s = state["held_up_s"]
        parts.assessor.pace = replace(parts.assessor.pace, step_s=state["step_s"])
        parts.shards.frozen.own = set(state["own_frozen"])
        parts.membership.load_state_dict(state)
