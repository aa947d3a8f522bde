"""How a rank reaches its peers in a quorum: a process group, and a store for what they share beside tensors.

The store is that of one of those present; what is in it are addresses and JSON.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_pso.distributed import tcp_store
from ds_pso.distributed.full_duplex_gloo import FullDuplexGloo
from ds_pso.distributed.membership import JSONValue
from ds_pso.elastic.launch_env import Launch
from ds_pso.elastic.quorum import ElasticQuorum
from ds_pso.errors import PeerError

CONNECT_S = 20.0  # who has just said that it is there must connect within it


class Connections:
    """The connections of one rank.

    Args:
        own: the store that this rank hosts, in the first rank of a particle.

    Attributes:
        made_for: the number of the quorum for which they were made; empty: there are none.
        group: of the rank and its peers.
    """

    def __init__(self, launch: Launch, timeout_s: float, own: dist.TCPStore | None = None) -> None:
        self._launch = launch
        self._me = launch.layout.particle
        self._timeout_s = timeout_s
        self._longest = timedelta(seconds=min(CONNECT_S, timeout_s))
        self._own = own
        self._hosts: dict[str, dist.TCPStore] = {}  # by address, of this quorum's host
        self._store: dist.Store | None = None
        self.made_for = ""
        self.group: FullDuplexGloo | None = None

    @property
    def address(self) -> str:
        """``host:port`` of the own store."""
        assert self._own is not None
        return f"{self._launch.host}:{self._own.port}"

    def make(self, quorum: ElasticQuorum) -> None:
        """Connect anew, with the members of a quorum.

        Raises:
            PeerError: one of them cannot be reached.
        """
        self.group = self._store = None
        self.made_for = ""
        try:
            host, name = quorum.members[0].store, f"quorum/{quorum.number}"
            store = self._store = dist.PrefixStore(name, self._store_of(host))
            if self._own is not None and host == self.address:
                self._forget_all_but(name)
            here, shard = self._launch.layout.particle, self._launch.layout.shard_rank
            store.set(f"here/{shard}/{here}", "1")
            store.wait([f"here/{shard}/{particle}" for particle in quorum.present], self._longest)
            options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._launch.host)]
            options._timeout = timedelta(seconds=self._timeout_s)
            peers = dist.PrefixStore(f"peers/{shard}", store)
            self.group = FullDuplexGloo(peers, quorum.present.index(here), len(quorum.present), options)
            self.made_for = quorum.number
        except (dist.DistError, RuntimeError) as error:
            raise PeerError(
                f"particle {self._me}: the particles {list(quorum.present)} do not connect "
                f"({str(error).splitlines()[0]})"
            ) from error

    def drop(self) -> None:
        """Close connections; peers see a reset and start a new quorum."""
        self.group = self._store = None
        self._hosts, self.made_for = {}, ""

    def close(self) -> None:
        self.drop()
        self._own = None

    def share(self, quorum: ElasticQuorum, what: str, value: JSONValue) -> None:
        """Put a JSON value where the whole quorum can read it."""
        with _as_peer_error(f"particle {self._me}: sharing its state"):
            self._require_store().set(f"{quorum.number}/{what}", json.dumps(value))

    def receive(self, quorum: ElasticQuorum, what: str) -> JSONValue:
        """Wait for what another has put there, and return it."""
        with _as_peer_error(f"particle {self._me}: waiting for what another shares"):
            store = self._require_store()
            store.wait([f"{quorum.number}/{what}"], timedelta(seconds=self._timeout_s))
            value: JSONValue = json.loads(store.get(f"{quorum.number}/{what}"))
            return value

    def _require_store(self) -> dist.Store:
        if self._store is None:
            raise PeerError(f"particle {self._me}: the quorum has broken up")
        return self._store

    def _store_of(self, address: str) -> dist.TCPStore:
        if address not in self._hosts:
            host, port = address.rsplit(":", 1)
            store = tcp_store.reach(host, int(port), timeout_s=self._longest.total_seconds())
            self._hosts = {address: store}  # that of the last quorum is not needed any more
        return self._hosts[address]

    def _forget_all_but(self, name: str) -> None:
        """Drop the keys of earlier quorums, which everybody has left; the store would grow with each."""
        assert self._own is not None
        for key in self._own.list_keys():
            if not key.startswith(f"{name}/"):
                self._own.delete_key(key)


@contextlib.contextmanager
def _as_peer_error(what: str) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, PeerError):
            raise
        raise PeerError(f"{what}: {str(error).splitlines()[0]}") from error
