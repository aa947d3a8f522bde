"""The particles of a sync, and which of them need the state of another: plain arithmetic on what all have said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class QuorumMember:
    """A particle's standing, as it says it when it comes to a sync point.

    Attributes:
        particle: its place.
        name: of this life of it; a process that takes its place has another.
        born: when that began, in ns.
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
    born: int
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
        late_counts: whether the work of a particle that has missed a sync point counts at the next.
    """

    number: str
    members: tuple[QuorumMember, ...]
    rejected: dict[str, str]
    late_counts: bool = False

    @classmethod
    def of(cls, number: str, everybody: Sequence[QuorumMember], *, late_counts: bool = False) -> ElasticQuorum:
        """Find it. Of two that claim a place the younger stays; of models that of most, then of the most advanced."""
        rejected: dict[str, str] = {}
        places: dict[int, QuorumMember] = {}
        for member in sorted(everybody, key=lambda m: (m.born, m.name)):
            if member.particle in places:
                rejected[places[member.particle].name] = "a younger process has taken its place in the swarm"
            places[member.particle] = member
        there = [places[particle] for particle in sorted(places)]
        models = Counter(member.model for member in there)
        leader = max(there, key=lambda m: (models[m.model], *_standing(m)))
        for member in there:
            if member.model != leader.model:
                rejected[member.name] = (
                    f"its model or config is not that of particle {leader.particle}; start all particles with one "
                    "script and one JSON"
                )
        return cls(number, tuple(m for m in there if m.name not in rejected), rejected, late_counts)

    @property
    def present(self) -> tuple[int, ...]:
        return tuple(member.particle for member in self.members)

    @property
    def is_start(self) -> bool:
        """True if nobody knows anything yet."""
        return all(member.fresh for member in self.members)

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
