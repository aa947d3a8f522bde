"""What is damaged on the way is noticed by all peers before anybody uses it, and moved again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comm.test_exchange import make_worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_pso.comm.compression import Differences, find_format
from ds_pso.comm.exchange import Exchange, fill
from ds_pso.errors import PeerError
from ds_pso.utils.checksums import TRIES, Added, checksum, sealed, unsealed

P = 3
NUMEL = 1003


def flip(tensor: Tensor, bit: int) -> None:
    """A bit of the tensor, counted from its first byte."""
    raw = tensor.view(-1).view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8


# -- the sums themselves --------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]), st.data())
def test_every_flipped_bit_changes_the_sum(numel, dtype, data):
    start = data.draw(st.integers(0, 3))
    raw = torch.arange(8 * (start + numel), dtype=torch.int64).to(torch.uint8)
    tensor = raw.view(dtype)[start : start + numel]
    before = checksum(tensor)
    flip(tensor, data.draw(st.integers(0, 8 * numel * dtype.itemsize - 1)))
    assert checksum(tensor) != before


def test_it_is_that_of_the_bits_alone():
    x = torch.randn(1001)
    assert checksum(x) == checksum(x.view(7, 143)) == checksum(torch.cat([torch.zeros(3), x])[3:])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), st.data())
def test_a_damaged_row_is_seen(row, data):
    whole = sealed(row)
    assert unsealed(whole) == row
    tensor = torch.tensor(whole, dtype=torch.int64)
    flip(tensor, data.draw(st.integers(0, 64 * len(whole) - 1)))
    assert unsealed(tensor.tolist()) is None


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["normal", "equal", "cancelling"])
def test_rounding_is_no_damage(kind, scale):
    """Equal elements are rounded alike, so that their errors do not cancel."""
    for seed in range(20):
        torch.manual_seed(seed)
        parts = [torch.randn(10_000) for _ in range(5)]
        if kind == "equal":
            parts = [torch.full((10_000,), float(torch.rand(()))) for _ in range(5)]
        elif kind == "cancelling":
            parts[1] = -parts[0]
        moved = [Added(part * scale) for part in parts]
        total = sum(m.tensor for m in moved)
        for m in moved:
            m.tensor = total
        assert moved[0].damage([m.row() for m in moved]) == ""


# -- collectives ----------------------------------------------------------------------------


class Damaging:
    """A process group in which one peer finds a flipped bit in what arrives, so many times."""

    def __init__(self, group: Any, name: str, bit: int, times: int, *, before: bool = False) -> None:
        self.group, self.name, self.bit, self.times, self.before = group, name, bit, times, before

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.group, name)
        if name != self.name:
            return real

        def start(*args: Any) -> Any:
            target = args[0]
            while not isinstance(target, Tensor):
                target = target[0]
            hit = self.times > 0 and target.dtype != torch.int64  # the checksums are another test
            if hit and self.before:
                flip(target, self.bit)
            work = real(*args)
            if hit:
                self.times -= 1
                work.wait()
                if not self.before:
                    flip(target, self.bit)
                return SimpleNamespace(wait=lambda: None)  # one that was received cannot be waited for twice
            return work

        return start


def run(job: Callable[[Exchange], Any], damage: Callable[[Any], Any] | None = None) -> list[Any]:
    """The job on P threads; ``damage`` wraps the process group of the last one."""
    worlds = make_worlds(P, timeout_s=2.0)
    if damage is not None:
        worlds[-1].peers.group = damage(worlds[-1].peers.group)

    def live(world: Any) -> Any:
        exchange = Exchange(world, NUMEL * 4 / 2**20 / 2, checksums=True)  # several buckets
        try:
            return job(exchange), exchange.traffic.repeated
        except PeerError as error:
            return error

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(P) as threads:
        warnings.simplefilter("always")
        results = list(threads.map(live, worlds))
    ours = [w for w in caught if "did not arrive as it was sent" in str(w.message)]
    tuples = [result for result in results if isinstance(result, tuple)]
    assert not tuples or len(ours) == tuples[0][1], "one of those who know it says so"
    return results


def tensors_of(particle: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(particle)
    return [torch.randn(NUMEL, generator=generator), torch.randn(7, generator=generator)]


def received(exchange: Exchange, arriving: Callable[[list[Tensor]], Any]) -> list[Tensor]:
    mine = tensors_of(exchange.particle)
    out = [torch.empty_like(t) for t in mine]
    fill(out, arriving(mine))
    return out


def differences() -> Differences:
    return Differences(find_format("int8"), [torch.zeros(NUMEL), torch.zeros(7)])


WEIGHTS = (0.5, 0.0, 0.5)
JOBS: dict[str, tuple[str, Callable[[Exchange], Any]]] = {
    "mean": ("allreduce", lambda e: received(e, lambda t: e.weighted_mean(t, WEIGHTS))),
    "one": ("broadcast", lambda e: received(e, lambda t: e.from_one(t, 1))),
    "each": ("alltoall_base", lambda e: received(e, lambda t: e.from_each(t, [1, 2, 0]))),
    "differences, parts": (
        "alltoall_base",
        lambda e: received(e, lambda t: e.mean_by_differences(t, WEIGHTS, differences(), feedback=True)),
    ),
    "differences, sums": (
        "allgather",
        lambda e: received(e, lambda t: e.mean_by_differences(t, WEIGHTS, differences(), feedback=True)),
    ),
    "differences to one": (
        "broadcast",
        lambda e: received(e, lambda t: e.from_one_by_differences(t, 0, differences())),
    ),
    "numbers": ("allgather", lambda e: [torch.tensor(e.all_gather([1.5 * e.particle, float("nan")]))]),
}


@pytest.mark.parametrize("times", [1, TRIES - 1])
@pytest.mark.parametrize("bit", [0, 23, 30, 31, 40])
@pytest.mark.parametrize("name", JOBS)
def test_what_was_damaged_is_moved_again(name, bit, times):
    collective, job = JOBS[name]
    expected = run(job)
    found = run(job, lambda group: Damaging(group, collective, bit, times))
    for (tensors, repeated), (others, never) in zip(found, expected, strict=True):
        assert (repeated, never) == (times, 0), "all know it alike"
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize(("bit", "seen"), [(31, True), (30, True), (29, True), (23, True), (0, False)])
def test_a_contribution_that_was_damaged(bit, seen):
    """All peers get the same wrong sum; it is not the sum of what was sent, and seen if by more than rounding may."""
    (expected, _), *_ = run(JOBS["mean"][1])
    for tensors, repeated in run(JOBS["mean"][1], lambda group: Damaging(group, "allreduce", bit, 1, before=True)):
        assert repeated == seen
        assert not seen or all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_a_link_that_damages_everything_is_an_error_of_all(name):
    collective, job = JOBS[name]
    for error in run(job, lambda group: Damaging(group, collective, 30, 1000)):
        assert isinstance(error, PeerError)
        assert f"{TRIES} times in a row" in str(error)


def test_damaged_checksums_end_it():
    class Liar(Damaging):
        def __getattr__(self, name: str) -> Any:
            real = getattr(self.group, name)

            def start(rows: Any, mine: Any) -> Any:
                work = real(rows, mine)
                work.wait()
                if mine[0].dtype == torch.int64:
                    flip(rows[0][0], 5)
                return SimpleNamespace(wait=lambda: None)

            return start if name == "allgather" else real

    *others, liar = run(JOBS["one"][1], lambda group: Liar(group, "", 0, 0))
    assert isinstance(liar, PeerError)
    assert "the checksums of particle 0 were damaged" in str(liar)
    assert all(isinstance(other, PeerError) for other in others), "they lose their peer"


def test_bytes_of_checksums_are_counted():
    """A row of 2 P + 1 numbers after a copy, and of 5 after a sum, from each of P - 1 peers."""

    def job(exchange: Exchange) -> int:
        JOBS["mean"][1](exchange)
        JOBS["one"][1](exchange)
        return exchange.bytes_received

    def plain(exchange: Exchange) -> int:
        exchange.collectives.checksums = False
        return job(exchange)

    for (counted, _), (without, _) in zip(run(job), run(plain), strict=True):
        buckets = 3
        assert counted - without == buckets * 8 * (P - 1) * ((2 * P + 1) + 5)
