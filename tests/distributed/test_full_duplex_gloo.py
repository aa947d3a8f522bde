"""gloo in both directions at once: what arrives, and in which order it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.distributed.full_duplex_gloo import FullDuplexGloo

_groups: dict[int, list[FullDuplexGloo]] = {}


def on_each(size: int, job: Callable[[FullDuplexGloo, int], Any]) -> list[Any]:
    """One thread for each rank."""
    with ThreadPoolExecutor(size) as threads:
        if size not in _groups:
            store = dist.HashStore()
            made = [threads.submit(FullDuplexGloo, store, i, size, timedelta(seconds=20)) for i in range(size)]
            _groups[size] = [group.result() for group in made]
        return list(threads.map(job, _groups[size], range(size)))


def content(sender: int, receiver: int, numel: int) -> torch.Tensor:
    return torch.arange(numel) + 1000.0 * sender + 100_000.0 * receiver


@given(
    st.integers(1, 4).flatmap(
        lambda p: st.lists(st.lists(st.integers(0, 5), min_size=p, max_size=p), min_size=p, max_size=p)
    )
)
def test_each_gets_what_each_has_for_it(numels: list[list[int]]) -> None:
    """numels[i][j] elements from i to j, its own included."""
    size = len(numels)

    def job(group: FullDuplexGloo, me: int) -> torch.Tensor:
        given = torch.cat([content(me, j, numels[me][j]) for j in range(size)])
        received = [numels[i][me] for i in range(size)]
        output = torch.full((sum(received),), -1.0)
        group.alltoall_base(output, given, received, numels[me]).wait()
        return output

    for me, output in enumerate(on_each(size, job)):
        assert torch.equal(output, torch.cat([content(i, me, numels[i][me]) for i in range(size)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_everybody_gets_what_each_has(size: int, dtype: torch.dtype) -> None:
    def job(group: FullDuplexGloo, me: int) -> list[torch.Tensor]:
        rows = [torch.zeros(3, dtype=dtype) for _ in range(size)]
        group.allgather([rows], [torch.full((3,), me + 1, dtype=dtype)]).wait()
        return rows

    for rows in on_each(size, job):
        assert [row.tolist() for row in rows] == [[i + 1] * 3 for i in range(size)]


def test_nothing_is_sent_before_all_has_been_asked_for() -> None:
    """Otherwise a request may wait behind what is being sent, and the two directions of a link take turns."""
    calls: list[tuple[str, int]] = []

    class Spy(FullDuplexGloo):
        def __init__(self) -> None:
            super().__init__(dist.HashStore(), 0, 1, timedelta(seconds=20))

        def rank(self) -> int:
            return 1

        def size(self) -> int:
            return 4

        def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
            calls.append(("recv", peer))

        def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
            calls.append(("send", peer))

    rows = [torch.zeros(1) for _ in range(4)]
    Spy().allgather([rows], [torch.ones(1)])
    assert calls == [(kind, peer) for kind in ("recv", "send") for peer in (2, 3, 0)]


def test_a_peer_that_does_not_come_is_an_error() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        first, _ = threads.map(lambda i: FullDuplexGloo(store, i, 2, timedelta(seconds=0.5)), range(2))
    with pytest.raises(RuntimeError):
        first.allgather([[torch.zeros(1), torch.zeros(1)]], [torch.zeros(1)]).wait()
