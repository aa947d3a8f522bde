"""Gives a particle that recovers the state of a donor, shard by shard; and one that is overdue the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ds_pso.comm.exchange import fill
from ds_pso.distributed.membership import Quorum
from ds_pso.sampler import SwarmSampler
from ds_pso.shards.untrained import as_bytes
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.parts import SyncParts
from ds_pso.sync.rollback import residuals, shared_state


def at_another_step(schedule: Mapping[str, Any], theirs: int, mine: int) -> dict[str, Any]:
    """Return the state of a schedule at step ``theirs`` as it is at step ``mine``, with equal steps since a sync."""
    return {**schedule, "begun": schedule["begun"] + mine - theirs}


class Numbers(Protocol):
    """Whoever keeps the numbers of all syncs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Progress(Protocol):
    """The progress of one rank's training."""

    @property
    def step(self) -> int:
        """Optimizer steps so far."""

    def read(self) -> dict[str, Any]:
        """Return it as JSON values; ``step`` is among them."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Go on from there."""

    def place(self, sampler: SwarmSampler) -> None:
        """Let a new sampler go on where that of the donor is, if this particle has recovered."""


class Recovery:
    """Takes over state before a sync; what concerns training itself counts when the sync has been committed.

    Args:
        numbers: of the rule, the schedule and the syncs so far.

    Attributes:
        received: the donor's progress in training; None: this particle has not recovered.
    """

    def __init__(self, parts: SyncParts, progress: Progress, numbers: Numbers) -> None:
        self._parts = parts
        self.progress = progress
        self._numbers = numbers
        self.received: Mapping[str, Any] | None = None

    def recover(self, quorum: Quorum, window: FitnessWindow, step: int) -> int:
        """Exchange what somebody in the quorum lacks. Called alike on all ranks of all who take part.

        Args:
            step: the optimizer step at which this particle stands.

        Returns:
            The step from which it goes on: the donor's if it recovers.
        """
        self.received = None
        parts, me = self._parts, self._parts.exchange.particle
        if not quorum.is_start:
            self._share(quorum, me)
        if quorum.recovering:
            untrained = list(parts.shards.frozen.tensors().values())
            with parts.shards.flat_buffers() as buffers, as_bytes(untrained) as frozen:
                tensors = [*parts.shards.tensors, *frozen, *buffers]
                if not quorum.is_start:
                    tensors += shared_state(parts.updater)
                fill(tensors, parts.exchange.from_each(tensors, quorum.sources))
        if quorum.is_start or me in quorum.recovering:
            parts.shards.remember_start()
        if quorum.is_start:
            parts.start_state()
        elif me in quorum.overdue:
            self._catch_up(quorum)
        elif me in quorum.recovering:
            found = self._receive(quorum.sources[me])
            self._take_numbers(found["sync"], lr_factor=1.0)
            self.received = found["progress"]
            for residual in [*residuals(parts.updater), *parts.moment_residuals()]:
                residual.zero_()
            window.clear()
            return int(found["progress"]["step"])
        return step

    def restore_frozen(self) -> dict[int, list[str]]:
        """Give back what is not trained where it has changed, and not on all particles. Called alike on all peers.

        What has changed on all of them is from now on their own affair: a teacher that follows its student, say.

        Returns:
            What was given back to each particle, by name.
        """
        exchange, frozen = self._parts.exchange, self._parts.shards.frozen
        rows, names = exchange.all_gather(frozen.digests()), [*frozen.compared()]
        given: dict[int, list[str]] = {}
        from_whom: dict[int, list[str]] = {}
        for number, name in enumerate(names):
            column = {particle: rows[particle][number] for particle in exchange.present}
            kept = [value for value in column.values() if value > 0]
            if 0 in column.values() or (not kept and len(set(column.values())) > 1):
                frozen.own.add(name)
            elif len(set(map(abs, column.values()))) > 1:
                right = max(kept, key=kept.count)  # of those that are as frequent, the first one's
                donor = next(particle for particle, value in column.items() if value == right)
                from_whom.setdefault(donor, []).append(name)
                for particle, value in column.items():
                    if abs(value) != right:
                        given.setdefault(particle, []).append(name)
        tensors = frozen.compared()
        for donor, changed in sorted(from_whom.items()):
            with as_bytes([tensors[name] for name in changed]) as flat:
                fill(flat, exchange.from_one(flat, donor))
        if from_whom:
            frozen.remember()
        return given

    def _share(self, quorum: Quorum, me: int) -> None:
        needed = {quorum.donors[0], *(quorum.sources[particle] for particle in quorum.recovering)}
        if self._parts.world.is_leader and me in needed:
            state = {"sync": self._numbers.state_dict(), "progress": self.progress.read()}
            self._parts.membership.share(f"state/{me}", state)

    def _receive(self, donor: int) -> dict[str, Any]:
        found = self._parts.membership.receive(f"state/{donor}")
        assert isinstance(found, dict)
        return found

    def _catch_up(self, quorum: Quorum) -> None:
        """Take over the donor's numbers; as many steps since the last sync are counted from the own step."""
        found = self._receive(quorum.donors[0])
        theirs, mine = found["progress"]["step"], self.progress.step
        schedule = at_another_step(found["sync"]["schedule"], theirs, mine)
        self._take_numbers({**found["sync"], "schedule": schedule}, lr_factor=self._parts.shards.lr_factor)

    def _take_numbers(self, found: Mapping[str, Any], *, lr_factor: float) -> None:
        """Take over rule, schedule and count of syncs; what they have cost stays this rank's own."""
        mine = self._numbers.state_dict()
        totals = mine["totals"] | {"count": found["totals"]["count"]}
        self._numbers.load_state_dict({**found, "totals": totals, "lr_factor": lr_factor, "pending": None})

    def commit(self) -> bool:
        """Let training go on where the donor's is, when the sync counts. Returns whether it recovers."""
        received, self.received = self.received, None
        if received is not None:
            self.progress.write(received)
        return received is not None
