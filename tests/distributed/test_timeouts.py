"""``swarm.timeout_s`` is what is waited: at each place where it is handed on, and nowhere by the clock."""

from __future__ import annotations

import queue
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from pool import Pool

import ds_pso
from ds_pso.distributed import coordinator as coordinators
from ds_pso.distributed import peer_group, tcp_store
from ds_pso.distributed.coordinator import LINGER_S, StoreCoordinator
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.peer_group import connect_peers
from ds_pso.errors import PeerError
from ds_pso.utils.background_task import Background

LIMIT_S = 17.0
LIMIT = timedelta(seconds=LIMIT_S)


class Clock:
    """Stands in for ``time`` in the coordinator: time passes while the store is asked to wait."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Store:
    """Notes how long it is asked to wait; nobody ever comes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.waited_s = 0.0

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.waited_s += timeout.total_seconds()
        self.clock.now += timeout.total_seconds()
        raise dist.DistStoreError("nobody came")

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        return False


def lonely(rank: int = 1) -> tuple[StoreCoordinator, Store]:
    """One of four ranks; not the leader, which lingers."""
    store, found = Store(), StoreCoordinator(Layout(rank, 4, 2), LIMIT_S, Background())
    found.store = store  # type: ignore[assignment]
    return found, store


@pytest.mark.parametrize(
    "wait",
    [
        lambda c: c.barrier("start", range(4)),
        lambda c: c.next_barrier("sync", range(4)),
        lambda c: c.next_barrier("sync", range(4), with_local_ranks=True),
        lambda c: c.gather("bytes", 1),
        lambda c: c.wait(["key"], [0], "an address"),
    ],
    ids=["barrier", "sync", "sync with local ranks", "gather", "wait"],
)
def test_the_store_is_asked_to_wait_so_long(wait, monkeypatch):
    """In pieces, between which it is asked whether those who are missing have closed."""
    coordinator, store = lonely()
    monkeypatch.setattr(coordinators, "time", store.clock)
    with pytest.raises(PeerError) as caught:
        wait(coordinator)
    assert store.waited_s == pytest.approx(LIMIT_S)
    assert f"waited {LIMIT_S:g} s for" in str(caught.value)


def test_a_frozen_store_is_given_up_a_little_later(monkeypatch):
    limits = []

    class Queue:
        def put(self, _: object) -> None:
            pass

        def get(self, timeout: float) -> None:
            limits.append(timeout)
            raise queue.Empty

    monkeypatch.setattr(coordinators.queue, "SimpleQueue", Queue)
    coordinator, store = lonely()
    monkeypatch.setattr(coordinators, "time", store.clock)
    with pytest.raises(PeerError, match="no longer answers"):
        coordinator.barrier("start", range(4))
    assert limits == [LIMIT_S + LINGER_S]


@pytest.mark.parametrize("given", [3.0, None])
def test_a_second_connection_waits_as_long_unless_told(given):
    coordinator, _ = lonely()
    coordinator.store = None
    assert coordinator.second_connection(given).timeout_s == (given or LIMIT_S)


def test_the_group_of_the_peers_is_made_with_it(monkeypatch):
    seen = []

    def connect(store: object, rank: int, size: int, timeout: timedelta) -> tuple[Any, Any]:
        seen.append(timeout)
        return object(), "cpu"

    monkeypatch.setitem(peer_group.BACKENDS, "gloo", connect)
    connect_peers("gloo", object(), 0, 2, LIMIT_S)  # type: ignore[arg-type]
    assert seen == [LIMIT]


def handed_on(section: dict[str, Any]) -> dict[str, set[Any]]:
    """What ``ds_pso.init`` hands to stores and process groups; collectives on a CPU wait for their group."""
    seen: dict[str, set[Any]] = {"store": set(), "group": set()}

    def spied(function: Any, where: str, of: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            seen[where].add(of(args, kwargs))
            return function(*args, **kwargs)

        return spy

    for name in ("host", "reach"):  # the particle's own store has a limit of torch's
        setattr(tcp_store, name, spied(getattr(tcp_store, name), "store", lambda _, kwargs: kwargs.get("timeout_s")))
    peer_group.BACKENDS["gloo"] = spied(peer_group.BACKENDS["gloo"], "group", lambda args, _: args[3])
    with ds_pso.init(section) as swarm:
        swarm.gather(0.0)
        assert swarm.world.coordinator.timeout_s == LIMIT_S
        seen["store"].discard(None)
        return {name: set(values) for name, values in seen.items()}


def test_a_swarm_waits_as_long_as_its_config_says(pool: Pool) -> None:
    section = {"swarm": {"particles": 2, "timeout_s": LIMIT_S, "peer_backend": "gloo"}}
    for seen in pool.run(handed_on, section, world_size=2):
        assert seen == {"store": {LIMIT_S}, "group": {LIMIT}}
