"""How the ranks of a particle wait for each other, and hear that one has failed."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.distributed.layout import Layout
from ds_pso.elastic.local_group import LocalRankFailed, StoreLocalGroup
from ds_pso.errors import PeerError
from ds_pso.utils.background_task import Background


def group_of(store: dist.Store, rank: int, size: int) -> StoreLocalGroup:
    """Of one rank of the second of two particles."""
    layout = Layout(size + rank, 2 * size, 2)
    coordinator = StoreCoordinator(layout, 5.0, Background(), layout.local_ranks)
    coordinator.store = store
    return StoreLocalGroup(coordinator, patience_s=5.0)


@pytest.mark.parametrize("lives_for", [0, 3])
def test_a_local_rank_waits_as_long_as_the_first_rank_asks(monkeypatch: pytest.MonkeyPatch, lives_for: int) -> None:
    """Who joins waits until the others come by; the first rank says all the while that it lives."""
    group, waits = group_of(dist.HashStore(), 1, 2), []

    def in_vain(keys: list[str], ranks: list[int], label: str, timeout_s: float) -> None:
        waits.append((keys, ranks))
        if len(waits) > lives_for:
            raise PeerError("nobody came")
        group.sign()
        raise PeerError("not yet")

    monkeypatch.setattr(group._coordinator, "wait", in_vain)
    with pytest.raises(PeerError, match="nobody came"):
        group._wait_while_it_asks("key")
    assert waits == [(["key"], [2])] * (lives_for + 1)


def test_a_rank_that_fails_instead_of_coming_is_an_error_of_all() -> None:
    store = dist.HashStore()
    first, second = (group_of(store, rank, 2) for rank in range(2))
    rows: list[list[list[float]]] = []
    thread = threading.Thread(target=lambda: rows.append(second.gather([2.0, 0.1])))
    thread.start()
    assert first.gather([1.0, 0.5]) == [[1.0, 0.5], [2.0, 0.1]]
    thread.join()
    assert rows == [[[1.0, 0.5], [2.0, 0.1]]]
    first.fail(PeerError("its peers were lost"))
    with pytest.raises(LocalRankFailed, match="its peers were lost") as found:
        second.gather([])
    second.fail(found.value)  # says nothing: all know
    assert not store.check(["row/2/1"])
