"""The world of a particle that is a job of its own: its ranks know each other, and meet other particles as they come.

Two stores: that of the job, which lives as long as the particle, and at each sync point that of one of those present.
Whatever breaks between particles is a ``PeerError``; ``retreat`` then brings the ranks of the particle back together.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from ds_pso.elastic.meeting import Meeting, Member
from ds_pso.elastic.membership import Membership
from ds_pso.elastic.place import Place, read_place
from ds_pso.elasticity import ElasticConfig
from ds_pso.errors import ConfigError, PeerError
from ds_pso.gloo import FullDuplexGloo
from ds_pso.letters import Mailbox
from ds_pso.world import World

_CONNECT_S = 20.0  # who has just said that it is there must connect within it


class MateFailed(PeerError):
    """All ranks of the particle know already."""


class ElasticWorld(World):
    """A rank's place in an elastic swarm. Roll calls, values from all and agreement are among its own particle."""

    meets_at_sync_points_only = True

    def __init__(self, place: Place, options: ElasticConfig, timeout_s: float) -> None:
        super().__init__(place.layout, timeout_s, place.layout.mates)
        self.place = place
        self.options = options
        self.backend = "gloo"
        self.present = (place.layout.particle,)
        self._connected = ""  # the number of the meeting for which the peer group was made
        self._membership: Membership | None = None  # in the first rank
        self._own_store: dist.TCPStore | None = None  # for a meeting, in the first rank
        self._stores: dict[str, dist.TCPStore] = {}  # by address, of this meeting's host
        self._meeting: Meeting | None = None
        self._meeting_store: dist.Store | None = None

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
                world._own_store = _bound_store(place.host)
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
            assert self._own_store is not None
            born = self._membership.born
            store = f"{self.place.host}:{self._own_store.port}"
            return Member(
                self.layout.particle,
                name,
                born,
                start=self.place.start,
                waits=waits,
                connected=self._connected,
                store=store,
                **said,
            )

        def ask() -> dict[str, Any]:
            assert self._membership is not None
            meeting = self._membership.ask(row, fresh=bool(said["fresh"]))
            return {"number": meeting.number, "members": [m.as_json() for m in meeting.members]}

        told = self._from_leader("meeting", ask)
        members = tuple(Member(**member) for member in told["members"])
        meeting = Meeting(told["number"], members, {}, late_counts=self.options.straggler == "async")
        self._connect(meeting)
        return meeting

    def _connect(self, meeting: Meeting) -> None:
        same = meeting.connected != "" and meeting.present == self.present
        self._meeting, self.present = meeting, meeting.present
        if same:
            return
        self.peer_group = self._meeting_store = None
        self._connected = ""
        try:
            store = self._store_of(meeting.members[0].store)
            self._meeting_store = dist.PrefixStore(f"meeting/{meeting.number}", store)
            here, shard = self.layout.particle, self.layout.shard_rank
            self._meeting_store.set(f"here/{shard}/{here}", "1")
            others = [f"here/{shard}/{particle}" for particle in meeting.present]
            self._meeting_store.wait(others, timedelta(seconds=min(_CONNECT_S, self.timeout_s)))
            options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.place.host)]
            options._timeout = timedelta(seconds=self.timeout_s)
            peers = dist.PrefixStore(f"peers/{shard}", self._meeting_store)
            self.peer_group = FullDuplexGloo(peers, meeting.present.index(here), len(meeting.present), options)
            self._connected = meeting.number
        except (dist.DistError, RuntimeError) as error:
            raise PeerError(
                f"particle {self.layout.particle}: the particles {list(meeting.present)} do not connect "
                f"({str(error).splitlines()[0]})"
            ) from error

    def _store_of(self, address: str) -> dist.TCPStore:
        if address not in self._stores:
            host, port = address.rsplit(":", 1)
            self._stores = {  # that of the meeting before is not needed any more
                address: dist.TCPStore(
                    host,
                    int(port),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=min(_CONNECT_S, self.timeout_s)),
                )
            }
        return self._stores[address]

    def tell(self, meeting: Meeting, what: str, value: Any) -> None:
        """Put a JSON value where all who meet can read it."""
        with _as_peer_error(f"particle {self.layout.particle}: telling the others"):
            self._require_store().set(f"{meeting.number}/{what}", json.dumps(value))

    def hear(self, meeting: Meeting, what: str) -> Any:
        """What somebody has told."""
        with _as_peer_error(f"particle {self.layout.particle}: waiting for what another tells"):
            store = self._require_store()
            store.wait([f"{meeting.number}/{what}"], timedelta(seconds=self.timeout_s))
            return json.loads(store.get(f"{meeting.number}/{what}"))

    def retreat(self, error: PeerError) -> None:
        """After an error between particles: let the mates know, and drop the connections, so that the peers notice."""
        if not isinstance(error, MateFailed):
            self._post({"failed": str(error)})
        self.peer_group = self._meeting_store = self._meeting = None
        self._stores, self._connected = {}, ""
        self.present = (self.layout.particle,)

    def _require_store(self) -> dist.Store:
        if self._meeting_store is None:
            raise PeerError(f"particle {self.layout.particle}: the meeting has broken up")
        return self._meeting_store

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
        mates = self.layout.mates
        keys = [f"{self._row}/{rank}" for rank in range(len(mates))]
        self._wait_patiently(keys, mates, "its particle at a sync point")
        rows = [json.loads(row) for row in self.store.multi_get(keys)]
        last = self._turns["row"] - 1
        if last >= 0:  # who has come here has read the one before
            self.store.delete_key(f"row/{last}/{self.layout.shard_rank}")
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
        self._wait_patiently([key], self.layout.mates[:1], "word from its first rank")
        told = json.loads(self.store.get(key))
        if "failed" in told:
            raise PeerError(told["failed"], agreed=True)
        return told["answer"]

    def _wait_patiently(self, keys: list[str], ranks: list[int], label: str) -> None:
        """Mates may be waiting for peers, each for its own, which takes up to the timeout."""
        timeout_s, self.timeout_s = self.timeout_s, 3 * self.timeout_s + 2 * _CONNECT_S
        self.timeout_s += self.options.straggler_s + 2 * self.options.heartbeat_s
        try:
            self._wait(keys, ranks, label)
        finally:
            self.timeout_s = timeout_s

    # -- what there is not ------------------------------------------------------------------

    def open_mailbox(self) -> Mailbox:
        raise ConfigError(
            'swarm.transport = "elastic": letters are not sent; set asynchronous to false, and '
            'swarm.elastic.straggler to "async" or "skip"'
        )

    def roll_call(self, label: str, ranks: Iterable[int]) -> None:
        super().roll_call(label, [rank for rank in ranks if rank in self.ranks])

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
        self._own_store = self._meeting_store = None
        self._stores = {}


def _bound_store(host: str) -> dist.TCPStore:
    """A store that listens on this address alone; torch's own choice would be every network."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host}: this machine cannot listen there ({error.strerror or error}); give ds-pso launch one of "
            "its own addresses"
        ) from error
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@contextlib.contextmanager
def _as_peer_error(what: str) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, PeerError):
            raise
        raise PeerError(f"{what}: {str(error).splitlines()[0]}") from error
