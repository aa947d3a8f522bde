"""The particles of a sync, and which of them need the state of another: plain arithmetic on what all have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STARTED_AGAIN = "its launcher has started it again, and the newer process has its place in the swarm"
_IS_TAKEN = (
    "another launcher's process runs in its place; give each place to one ds-pso launch, or end the other process first"
)


@dataclass(frozen=True)
class QuorumMember:
    """A particle's standing, as it says it when it comes to a sync point.

    Attributes:
        particle: its place.
        name: of this life of it; a process that takes its place has another.
        launcher: a name of the launcher that has started it; starts are counted by each launcher alone.
        attempt: how often that had started the particle before.
        life: counts the names that the process has had.
        run: when its swarm began, in ns by the clock of the lighthouse; 0: it is of none yet.
        index: sync points that it has been through.
        last: the number of the last quorum that it has been through; where it is another's, so is the state.
        size: of that quorum, in particles.
        fresh: it has just been started, and knows nothing.
        in_background: it goes on training meanwhile.
        joined: this life of it has synced with others; what it knows is not from its own disk alone.
        start: how many a new swarm waits for, and whether it still ``waits``.
        connected: the number of the quorum for which its present connections were made; empty: it has none.
        store: ``host:port`` of the store that its first rank hosts.
        model: a fingerprint of the model and the config, which must be equal.
    """

    particle: int
    name: str
    launcher: str
    attempt: int
    life: int
    run: int
    index: int
    last: str
    size: int
    fresh: bool
    in_background: bool
    joined: bool
    start: int
    waits: bool
    connected: str
    store: str
    model: str


@dataclass(frozen=True)
class ElasticQuorum:
    """Those who have come, alike on each of them.

    Attributes:
        number: of this quorum; no other has it.
        members: one for each place, in the order of particles.
        rejected: why members were sent away, by their names.
        created: when, in ns by the clock of the lighthouse; 0: without it.
        late_counts: whether the work of a particle that has missed a sync point counts at the next.
    """

    number: str
    members: tuple[QuorumMember, ...]
    rejected: dict[str, str]
    created: int = 0
    late_counts: bool = False

    @classmethod
    def of(
        cls, number: str, everybody: Sequence[QuorumMember], *, created: int = 0, late_counts: bool = False
    ) -> ElasticQuorum:
        """Find it: first those of another model are sent away, then those whose place another process has.

        No clock of one machine is compared with that of another.
        """
        leader = _leader(everybody)
        alike = [member for member in everybody if member.model == leader.model]
        rejected = {
            member.name: f"its model or config is not that of particle {leader.particle}; start all particles with one "
            "script and one JSON, and each swarm with a lighthouse of its own (ds-pso launch --port)"
            for member in everybody
            if member.model != leader.model
        }
        started = sorted(alike, key=lambda m: (m.attempt, m.life, *_standing(m), m.name))
        newest = _keep_last(started, lambda m: (m.particle, m.launcher), rejected, _STARTED_AGAIN)
        # Starts of two launchers cannot be compared: who runs keeps its place, however old the other is.
        places = _keep_last(
            sorted(newest, key=lambda m: (*_standing(m), m.launcher)), lambda m: m.particle, rejected, _IS_TAKEN
        )
        return cls(number, tuple(sorted(places, key=lambda m: m.particle)), rejected, created, late_counts)

    @property
    def present(self) -> tuple[int, ...]:
        return tuple(member.particle for member in self.members)

    @property
    def is_start(self) -> bool:
        """True if nobody knows anything yet."""
        return all(member.fresh for member in self.members)

    @property
    def run(self) -> int:
        """When the swarm began; see ``QuorumMember``."""
        return self.created if self.is_start else max(self.members, key=_standing).run

    @property
    def waits_for_more(self) -> bool:
        """True for a swarm that has not begun: until enough are there, or one of them has lost its patience."""
        enough = len(self.members) >= min(member.start for member in self.members)
        return self.is_start and not enough and all(member.waits for member in self.members)

    @property
    def connected(self) -> str:
        """The number of the quorum for which all have the connections that they have now; empty: not all the same."""
        numbers = {member.connected for member in self.members}
        return numbers.pop() if len(numbers) == 1 else ""

    @property
    def recovering(self) -> tuple[int, ...]:
        """Particles that must take over the state of another; at a start, all but the first."""
        if self.is_start:
            return self.present[1:]
        counts = self.late_counts
        return tuple(
            m.particle for m in self.members if m.fresh or (self._is_elsewhere(m) and not (counts and m.joined))
        )

    @property
    def overdue(self) -> tuple[int, ...]:
        """Particles that have missed sync points, and whose work counts all the same."""
        if self.is_start:
            return ()
        return tuple(m.particle for m in self.members if m.particle not in self.recovering and self._is_elsewhere(m))

    def _is_elsewhere(self, member: QuorumMember) -> bool:
        """True if others have synced without it, or it without them."""
        return member.last != max(self.members, key=_standing).last

    def sources(self, num_particles: int) -> tuple[int, ...]:
        """The particle whose state each takes, shape (P,); its own unless it recovers. Donors take turns."""
        found, donors = list(range(num_particles)), self.donors
        for number, particle in enumerate(self.recovering):
            found[particle] = donors[number % len(donors)]
        return tuple(found)

    @property
    def donors(self) -> list[int]:
        """Particles that have missed nothing."""
        return [p for p in self.present if p not in self.recovering and p not in self.overdue]

    @property
    def is_mixed(self) -> bool:
        """True if some wait and some go on training: they cannot exchange like this."""
        return len({member.in_background for member in self.members}) > 1


def _standing(member: QuorumMember) -> tuple[bool, int, int, int]:
    """Sort key of those whose state counts: who has been through most syncs, and of these those that were more."""
    return (not member.fresh, member.index, member.size, -member.particle)


def _leader(everybody: Sequence[QuorumMember]) -> QuorumMember:
    """Return the one whose model counts: of the model that runs on most places.

    Of two that run on equally many, that whose swarm began first; at a start, that of most, then of the lowest number.
    Whoever has just been started counts only where nobody runs, so no number of newcomers displaces a swarm.
    """

    def order(best: QuorumMember) -> tuple[int | str, ...]:
        alike = [member for member in everybody if member.model == best.model]
        running = {member.particle for member in alike if not member.fresh}
        places = {member.particle for member in alike}
        return (-len(running), best.run, -len(places), *(-value for value in _standing(best)), best.model)

    models = sorted({member.model for member in everybody})
    return min((max((m for m in everybody if m.model == model), key=_standing) for model in models), key=order)


def _keep_last(
    ordered: Sequence[QuorumMember], key: Callable[[QuorumMember], object], rejected: dict[str, str], why: str
) -> list[QuorumMember]:
    """Return of those with equal keys the last; reject the others."""
    kept: dict[object, QuorumMember] = {}
    for member in ordered:
        if key(member) in kept:
            rejected[kept[key(member)].name] = why
        kept[key(member)] = member
    return list(kept.values())
