"""The world of a particle that is a job of its own: its ranks know each other, and meet other particles as they come.

Two stores: that of the job, which lives as long as the particle, and at each sync point that of one of those present.
Whatever breaks between particles is a ``PeerError``; ``retreat`` then brings the ranks of the particle back together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from ds_pso.distributed import tcp_store
from ds_pso.distributed.mailbox import Mailbox
from ds_pso.distributed.world import World
from ds_pso.elastic.config import ElasticConfig
from ds_pso.elastic.connections import CONNECT_S, Connections
from ds_pso.elastic.launch_env import Place, read_place
from ds_pso.elastic.lighthouse import Membership
from ds_pso.elastic.quorum import Meeting, Member
from ds_pso.errors import ConfigError, PeerError

_SIGNS = "leader/signs"  # a number that grows while the first rank asks who is there


class MateFailed(PeerError):
    """All ranks of the particle know already."""


class ElasticWorld(World):
    """A rank's place in an elastic swarm. Roll calls, values from all and agreement are among its own particle."""

    meets_at_sync_points_only = True

    def __init__(self, place: Place, options: ElasticConfig, timeout_s: float) -> None:
        super().__init__(place.layout, timeout_s, place.layout.local_ranks)
        self.place = place
        self.options = options
        self.backend = "gloo"
        self.present = (place.layout.particle,)
        self._connections = Connections(place, timeout_s)
        self._membership: Membership | None = None  # in the first rank
        self._answers: list[str] = []  # keys of what the first rank has said

    @classmethod
    def join(cls, particles: int | Literal["node"], options: ElasticConfig, timeout_s: float) -> ElasticWorld:
        """Build the particle's own world. Call it where ``World.carve`` would be called.

        Raises:
            ConfigError: not started by ``ds-pso launch``, or what that says does not fit.
            PeerError: a rank of this particle did not come within ``timeout_s``.
        """
        place = read_place(particles, os.environ)
        if options.min_particles > place.layout.num_particles:
            raise ConfigError(
                f"swarm.elastic.min_particles = {options.min_particles}: there are "
                f"{place.layout.num_particles} places; use at most as many"
            )
        world = cls(place, options, timeout_s)
        if "MASTER_ADDR" not in os.environ:
            os.environ.setdefault("LOCAL_RANK", "0")
            world._describe_particle("127.0.0.1", world._host_particle_store("127.0.0.1"))
        try:
            world._join()
            if world.is_leader:
                world._membership = Membership(place.lighthouse, place.layout.particle, options, timeout_s)
                world._connections = Connections(place, timeout_s, tcp_store.host_at(place.host))
        except BaseException:
            world.abandon()
            raise
        return world

    def own_folder(self, folder: Path) -> Path:
        """Each particle writes by itself."""
        return self.particle_folder(folder)

    def shrink(self) -> None:
        """They are already; what a meeting in the background has raised is known."""
        self._task = None

    # -- sync points ------------------------------------------------------------------------

    def sign_of_life(self) -> None:
        if self._membership is not None:
            self._membership.sign_of_life()

    def assemble(self, **said: Any) -> Meeting:
        """Who meets now; connects this rank with its peers. Called alike on all ranks of the particle.

        Args:
            said: what ``Member`` says of the particle's state.

        Raises:
            PeerError: ``agreed`` if nobody can be met; else somebody was lost meanwhile: retreat, and try again.
        """
        self.settle()

        def row(name: str, *, waits: bool) -> Member:
            assert self._membership is not None
            assert self.store is not None
            self.store.add(_SIGNS, 1)
            return Member(
                self.layout.particle,
                name,
                self._membership.born,
                start=self.place.start,
                waits=waits,
                connected=self._connections.made_for,
                store=self._connections.address,
                **said,
            )

        def ask() -> dict[str, Any]:
            assert self._membership is not None
            meeting = self._membership.ask(row, fresh=bool(said["fresh"]))
            return {"number": meeting.number, "members": [m.as_json() for m in meeting.members]}

        told = self._from_leader("meeting", ask)
        members = tuple(Member(**member) for member in told["members"])
        meeting = Meeting(told["number"], members, {}, late_counts=self.options.straggler == "async")
        same = meeting.connected != "" and meeting.present == self.present
        self.present = meeting.present
        if not same:
            self.peer_group = None
            self._connections.make(meeting)
            self.peer_group = self._connections.group
        return meeting

    def tell(self, meeting: Meeting, what: str, value: Any) -> None:
        """See ``Connections``."""
        self._connections.tell(meeting, what, value)

    def hear(self, meeting: Meeting, what: str) -> Any:
        """See ``Connections``."""
        return self._connections.hear(meeting, what)

    def retreat(self, error: PeerError) -> None:
        """After an error between particles: tell the local ranks, and close connections: peers see a reset."""
        if not isinstance(error, MateFailed):
            self._post({"failed": str(error)})
        self.peer_group = None
        self._connections.drop()
        self.present = (self.layout.particle,)

    # -- inside the particle ----------------------------------------------------------------

    def particle_gather(self, values: list[float]) -> list[list[float]]:
        """As ``World.particle_gather``; a rank that has retreated instead of coming is an error on all.

        Raises:
            MateFailed: one has.
        """
        self._post({"values": list(values)})
        rows = self._read()
        failed = next((row["failed"] for row in rows if "failed" in row), None)
        if failed is not None:
            raise MateFailed(failed)
        return [row["values"] for row in rows]

    def _post(self, what: dict[str, Any]) -> None:
        """Whether it gets on or fails, a rank says one thing a turn."""
        self.settle()
        assert self.store is not None
        self._row = f"row/{self.turn('row')}"
        self.store.set(f"{self._row}/{self.layout.shard_rank}", json.dumps(what))

    def _read(self) -> list[dict[str, Any]]:
        assert self.store is not None
        local_ranks = self.layout.local_ranks
        keys = [f"{self._row}/{rank}" for rank in range(len(local_ranks))]
        self._wait_patiently(keys, local_ranks, "its particle at a sync point")
        rows = [json.loads(row) for row in self.store.multi_get(keys)]
        last = self._turns["row"] - 1
        if last >= 0:  # who has come here has read the one before, and all answers
            self.store.delete_key(f"row/{last}/{self.layout.shard_rank}")
        while self._answers:
            self.store.delete_key(self._answers.pop())
        return rows

    def _from_leader(self, label: str, question: Callable[[], Any]) -> Any:
        """What the first rank answers, on all ranks of the particle; its errors, too."""
        assert self.store is not None
        key = f"leader/{label}/{self.turn(label)}"
        if self.is_leader:
            try:
                answer = {"answer": question()}
            except Exception as error:
                self.store.set(key, json.dumps({"failed": str(error)}))
                raise
            self.store.set(key, json.dumps(answer))
            self._answers.append(key)
        self._wait_while_it_asks([key])
        told = json.loads(self.store.get(key))
        if "failed" in told:
            raise PeerError(told["failed"], agreed=True)
        return told["answer"]

    def _wait_while_it_asks(self, keys: list[str]) -> None:
        """For the first rank, which waits without bound where the others have to come by first; as long as it lives."""
        assert self.store is not None
        while True:
            signs = self.store.add(_SIGNS, 0)
            try:
                return self._wait_patiently(keys, self.layout.local_ranks[:1], "word from its first rank")
            except PeerError:
                if self.store.add(_SIGNS, 0) == signs:
                    raise

    def _wait_patiently(self, keys: list[str], ranks: list[int], label: str) -> None:
        """Mates may be waiting for peers, each for its own, which takes up to the timeout."""
        timeout_s, self.timeout_s = self.timeout_s, 3 * self.timeout_s + 2 * CONNECT_S
        self.timeout_s += self.options.straggler_s + 2 * self.options.heartbeat_s
        try:
            self._wait(keys, ranks, label)
        finally:
            self.timeout_s = timeout_s

    # -- what there is not ------------------------------------------------------------------

    def open_mailbox(self) -> Mailbox:
        raise ConfigError(
            'swarm.transport = "elastic": messages are not sent; set asynchronous to false, and '
            'swarm.elastic.straggler to "async" or "skip"'
        )

    def barrier(self, label: str, ranks: Iterable[int]) -> None:
        super().barrier(label, [rank for rank in ranks if rank in self.ranks])

    # -- leaving ----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave; nobody is waited for but the ranks of this particle."""
        if not self.closed and self._membership is not None:
            self._membership.close()
        super().close()

    def abandon(self) -> None:
        if self._membership is not None:
            self._membership.close()
        super().abandon()
        self._connections.close()
