"""A ``Membership`` of particles that come and go: the lighthouse says who is there, and all commit or nobody does."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

import torch
import torch.distributed as dist

from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.distributed.membership import JSONValue, Quorum
from ds_pso.distributed.peer_group import PeerGroup, ProcessGroup
from ds_pso.elastic.config import ElasticConfig
from ds_pso.elastic.connections import Connections
from ds_pso.elastic.launch_env import Launch
from ds_pso.elastic.lighthouse import QuorumClient
from ds_pso.elastic.local_group import StoreLocalGroup
from ds_pso.elastic.quorum import ElasticQuorum, QuorumMember
from ds_pso.errors import PeerError

log = logging.getLogger(__name__)


class _Answer(TypedDict):
    number: str
    created: int
    members: list[dict[str, object]]


class ElasticMembership:
    """A rank's view of the members of its swarm.

    Args:
        own_store: hosted by the first rank of a particle, which alone speaks with the lighthouse.
        peers: its group is made anew for each quorum of other members.
    """

    can_fail = True

    def __init__(
        self,
        launch: Launch,
        options: ElasticConfig,
        coordinator: StoreCoordinator,
        local: StoreLocalGroup,
        peers: PeerGroup,
        own_store: dist.TCPStore | None,
    ) -> None:
        layout = launch.layout
        self._launch = launch
        self._options = options
        self._coordinator = coordinator
        self._local = local
        self._peers = peers
        peers.present, peers.backend = (layout.particle,), "gloo"
        self._connections = Connections(launch, coordinator.timeout_s, own_store)
        self._client: QuorumClient | None = None
        if coordinator.is_leader:
            self._client = QuorumClient(launch.lighthouse, layout.particle, options, coordinator.timeout_s)
        self.has_newer_state = False
        self.waited_s = 0.0
        self._model = ""
        self._quorum: ElasticQuorum | None = None  # the present one; None where none was tried since the last
        self._fresh = True
        self._joined, self._run = False, 0  # see ``QuorumMember``
        self._last, self._size = "", 0  # the quorum that this particle has been through, and its size

    def introduce(self, fingerprint: str, section: Mapping[str, JSONValue]) -> None:
        layout = self._launch.layout
        text = json.dumps([fingerprint, layout.particle_size, layout.num_particles, dict(section)])
        self._model = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._fresh, self._joined, self._run, self.has_newer_state = True, False, 0, False
        self._last, self._size = "", 0

    def start_quorum(self, index: int, *, in_background: bool = False) -> Quorum:
        begin = time.perf_counter()
        self._coordinator.background.settle()

        def request() -> _Answer:
            assert self._client is not None
            quorum = self._client.request_quorum(
                lambda name, *, waits: self._standing(name, index, waits=waits, in_background=in_background),
                fresh=self._fresh,
            )
            return {
                "number": quorum.number,
                "created": quorum.created,
                "members": [asdict(member) for member in quorum.members],
            }

        found = self._local.from_leader("quorum", request)
        members = tuple(QuorumMember(**member) for member in found["members"])  # type: ignore[arg-type]
        late_counts = self._options.straggler == "async"
        quorum = ElasticQuorum(found["number"], members, {}, created=found["created"], late_counts=late_counts)
        self._connect(quorum)
        self._quorum = quorum
        self.waited_s = time.perf_counter() - begin
        self._local.gather([])  # one of the local ranks may not have reached its peers
        return Quorum(
            quorum.present,
            quorum.recovering,
            quorum.overdue,
            quorum.sources(self._launch.layout.num_particles),
            quorum.is_start,
            quorum.is_mixed,
        )

    def _standing(self, name: str, index: int, *, waits: bool, in_background: bool) -> QuorumMember:
        assert self._client is not None
        self._local.sign()
        return QuorumMember(
            self._launch.layout.particle,
            name,
            launcher=self._launch.launcher,
            attempt=self._launch.attempt,
            life=self._client.life,
            run=self._run,
            index=index,
            last=self._last,
            size=self._size,
            fresh=self._fresh,
            in_background=in_background,
            joined=self._joined,
            start=self._launch.start,
            waits=waits,
            connected=self._connections.made_for,
            store=self._connections.address,
            model=self._model,
        )

    def _connect(self, quorum: ElasticQuorum) -> None:
        same = quorum.connected != "" and quorum.present == self._peers.present
        self._peers.present = quorum.present
        if not same:
            self._peers.group = None
            self._connections.make(quorum)
            self._peers.group = cast(ProcessGroup | None, self._connections.group)

    def should_commit(self, error: PeerError | None) -> bool:
        """Decide whether all who take part have got through; else nobody keeps what has come.

        Who is lost in the very moment of voting may leave some with a yes and others with a no: these recover next.
        """
        try:
            if error is not None:
                raise error
            self._vote()
        except PeerError as failure:
            if failure.agreed:
                raise
            log.info("the sync was broken off: %s", failure)
            # Close connections; peers see a reset and start a new quorum.
            self._local.fail(failure)
            self._peers.group, self._peers.present = None, (self._launch.layout.particle,)
            self._connections.drop()
            return False
        quorum, me = self._quorum, self._launch.layout.particle
        assert quorum is not None
        self._last, self._size, self._run = quorum.number, len(quorum.members), quorum.run
        # Whoever was there at the start alone knows no more than it may have on its disk.
        self._joined = self._joined or not quorum.is_start
        if me in quorum.recovering and not quorum.is_start and self._fresh:
            self.has_newer_state = True
        self._fresh = False
        return True

    def _vote(self) -> None:
        """Wait for each shard's peers, then for the local ranks: that they come is their vote."""
        if self._peers.group is not None:
            mine = torch.ones(1)
            rows = [torch.empty(1) for _ in self._peers.present]
            try:
                self._peers.group.allgather([rows], [mine]).wait()
            except RuntimeError as error:
                raise PeerError(f"a peer was lost before it could commit ({str(error).splitlines()[0]})") from error
        self._local.gather([])

    def wait_for_local_ranks(self) -> None:
        self._quorum = None
        self._local.gather([])

    def confirm_local_ranks(self) -> None:
        self._local.gather([])

    def heartbeat(self) -> None:
        if self._client is not None:
            self._client.heartbeat()

    def reachable(self) -> Sequence[int]:
        return (self._launch.layout.particle,)

    def share(self, key: str, value: JSONValue) -> None:
        assert self._quorum is not None
        self._connections.share(self._quorum, key, value)

    def receive(self, key: str) -> JSONValue:
        assert self._quorum is not None
        return self._connections.receive(self._quorum, key)

    def folder(self, path: Path) -> Path:
        return self._launch.layout.particle_folder(path)

    def reloaded(self) -> None:
        self._joined = False

    def state_dict(self) -> dict[str, JSONValue]:
        return {"last_quorum": [self._last, self._size]}

    def load_state_dict(self, state: Mapping[str, JSONValue]) -> None:
        # A checkpoint of a static swarm has none, on all particles alike.
        self._last, self._size = state.get("last_quorum", ["", 0])  # type: ignore[misc, assignment]

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def disconnect(self) -> None:
        self._connections.close()
