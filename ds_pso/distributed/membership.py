"""Who takes part in a sync: what a synchronizer asks, and the answers of a swarm whose particles are always the same.

The words are torchft's: quorum, donor, recovering, commit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ds_pso.distributed.coordinator import Coordinator
from ds_pso.distributed.layout import Layout
from ds_pso.errors import PeerError, SwarmError

JSONValue = str | int | float | bool | None | Sequence["JSONValue"] | Mapping[str, "JSONValue"]


@dataclass(frozen=True)
class Quorum:
    """The particles of one sync, alike on each of them.

    Attributes:
        present: in order.
        recovering: take over the state of another.
        overdue: have missed a sync, and their work counts all the same; they take over numbers alone.
        sources: whose state each particle takes, shape (P,); its own unless it recovers.
        is_start: no particle has synced before.
        is_mixed: some wait for it and some go on training, so that they cannot exchange.
    """

    present: Sequence[int]
    recovering: Sequence[int] = ()
    overdue: Sequence[int] = ()
    sources: Sequence[int] = ()
    is_start: bool = False
    is_mixed: bool = False

    @property
    def donors(self) -> list[int]:
        """Particles that have missed nothing."""
        return [particle for particle in self.present if particle not in (*self.recovering, *self.overdue)]


class Membership(Protocol):
    """The questions of a synchronizer about the swarm's members.

    Attributes:
        can_fail: whether a sync may be broken off, to be tried again with those who are left.
        has_newer_state: whether this particle has joined a running swarm, whose state is newer than any checkpoint.
        waited_s: how long the last quorum took to assemble.
    """

    can_fail: bool
    has_newer_state: bool
    waited_s: float

    def introduce(self, fingerprint: str, section: Mapping[str, JSONValue]) -> None:
        """Compare model and config with those of the others, or say them at the next quorum.

        Raises:
            SwarmError: the models differ.
        """

    def start_quorum(self, index: int, *, in_background: bool = False) -> Quorum:
        """Wait for those who take part in the next sync. Called alike on all ranks of the particle.

        Args:
            index: syncs that this particle has been through.
            in_background: it goes on training meanwhile.

        Raises:
            PeerError: somebody did not come; "agreed" if another try is of no use.
        """

    def should_commit(self, error: PeerError | None) -> bool:
        """Decide with all who take part whether the result of the sync counts.

        Args:
            error: what has gone wrong on this rank.

        Returns:
            True: it does. False: nobody keeps what has come, and all try again.

        Raises:
            PeerError: ``error``, where nobody can try again.
        """

    def wait_for_local_ranks(self) -> None:
        """Wait for the ranks of this particle, before a sync in the background begins."""

    def confirm_local_ranks(self) -> None:
        """Learn whether a rank of this particle has failed in an exchange, before they do something together."""

    def heartbeat(self) -> None:
        """Say that training goes on."""

    def reachable(self) -> Sequence[int]:
        """Return the particles that can exchange now, between two syncs."""

    def share(self, key: str, value: JSONValue) -> None:
        """Let the others of the quorum read a value."""

    def receive(self, key: str) -> JSONValue:
        """Wait for what another has shared, and return it."""

    def folder(self, path: Path) -> Path:
        """Return where this launch writes what the script puts into ``path``."""

    def reloaded(self) -> None:
        """Take note that a checkpoint was loaded."""

    def state_dict(self) -> dict[str, JSONValue]:
        """Return what a checkpoint must keep."""

    def load_state_dict(self, state: Mapping[str, JSONValue]) -> None:
        """Go on from there."""

    def close(self) -> None:
        """Take part no more."""

    def disconnect(self) -> None:
        """Close connections that others may have needed until now."""


class StaticMembership:
    """All particles of one launch take part in every sync, or it is an error that names who is missing."""

    can_fail = False
    has_newer_state = False

    def __init__(self, layout: Layout, coordinator: Coordinator) -> None:
        self._layout = layout
        self._coordinator = coordinator
        self._fresh = True
        self.waited_s = 0.0

    def introduce(self, fingerprint: str, section: Mapping[str, JSONValue]) -> None:
        self._fresh = True
        size = self._layout.particle_size
        found = self._coordinator.gather("the model of every particle", fingerprint)
        for rank, other in enumerate(found):
            if other != found[rank % size]:
                raise SwarmError(
                    f"the model of {self._coordinator.describe(rank)} is not that of particle 0 (names, shapes, dtypes "
                    "or ZeRO partitioning differ); build the same model with the same config on every rank",
                    agreed=True,
                )

    def start_quorum(self, index: int, *, in_background: bool = False) -> Quorum:
        begin, everybody = time.perf_counter(), range(self._layout.num_particles)
        if self._fresh:  # ``introduce`` has been their barrier
            self._fresh = False
            return Quorum(everybody, everybody[1:], sources=[0] * len(everybody), is_start=True)
        # Local ranks, too: a frozen one would be waited for without a word inside the particle.
        self._coordinator.next_barrier("sync", self._layout.peers, with_local_ranks=not in_background)
        self.waited_s = time.perf_counter() - begin
        return Quorum(everybody)

    def should_commit(self, error: PeerError | None) -> bool:
        if error is not None:
            raise error
        return True

    def wait_for_local_ranks(self) -> None:
        self._coordinator.next_barrier("sync", self._layout.local_ranks)

    def confirm_local_ranks(self) -> None:
        """Nothing to do: who fails ends the launch."""

    def heartbeat(self) -> None:
        """Nothing to do: the launcher watches its processes."""

    def reachable(self) -> Sequence[int]:
        return range(self._layout.num_particles)

    def share(self, key: str, value: JSONValue) -> None:
        """Nothing to do: nobody takes over anything but weights."""

    def receive(self, key: str) -> JSONValue:
        return None

    def folder(self, path: Path) -> Path:
        return path

    def reloaded(self) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, JSONValue]:
        return {}

    def load_state_dict(self, state: Mapping[str, JSONValue]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        """Nothing to do."""
