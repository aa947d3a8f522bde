"""The exchange between particles: threads of one process, each with its own gloo process group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_pso.comm.compression import BLOCK, FORMATS, Differences, find_format, is_partial
from ds_pso.comm.exchange import Exchange, plan_buckets, wire_dtype
from ds_pso.distributed.full_duplex_gloo import FullDuplexGloo
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.peer_group import PeerGroup
from ds_pso.errors import PeerError
from ds_pso.utils.background_task import Background

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
DENSE = [name for name in FORMATS if not is_partial(name)]  # the others: test_sparse.py


# -- cutting into buckets -------------------------------------------------------------------


@relaxed
@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 60))
def test_buckets_tile_every_tensor_exactly_once_and_in_order(numels, capacity):
    buckets = plan_buckets(numels, capacity)
    pieces = [piece for bucket in buckets for piece in bucket]
    visited = [(piece.tensor, i) for piece in pieces for i in range(piece.start, piece.stop)]
    assert visited == [(tensor, i) for tensor, numel in enumerate(numels) for i in range(numel)]
    assert all(piece.start < piece.stop for piece in pieces)


@relaxed
@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 60))
def test_buckets_are_packed_without_gaps_and_full_but_the_last(numels, capacity):
    buckets = plan_buckets(numels, capacity)
    for bucket in buckets:
        assert bucket, "an empty bucket"
        ends = [piece.offset + piece.stop - piece.start for piece in bucket]
        assert [piece.offset for piece in bucket] == [0, *ends[:-1]]
        assert ends[-1] == capacity or (bucket is buckets[-1] and ends[-1] < capacity)
    assert len(buckets) == math.ceil(sum(numels) / capacity)


@pytest.mark.parametrize("numels", [[6, 6], [12, 3]])
def test_sizes_that_do_not_tile_a_bucket_lose_nothing(numels):
    pieces = [piece for bucket in plan_buckets(numels, 10) for piece in bucket]
    assert sum(piece.stop - piece.start for piece in pieces) == sum(numels)


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_made_in_fp32_at_least(dtype, wire):
    assert wire_dtype(torch.zeros(0, dtype=dtype)) == wire


# -- a group of threads ---------------------------------------------------------------------


def make_worlds(num_particles: int, timeout_s: float = 30.0) -> list[Any]:
    """What an exchange needs to know of its world, once per particle."""
    store = dist.HashStore()

    def make(particle: int) -> Any:
        group = None
        if num_particles > 1:
            group = FullDuplexGloo(store, particle, num_particles, timedelta(seconds=timeout_s))
        return SimpleNamespace(
            layout=Layout(particle, num_particles, num_particles),
            peers=PeerGroup(group, range(num_particles), "none" if group is None else "gloo"),
            coordinator=SimpleNamespace(timeout_s=timeout_s, describe=lambda rank: f"particle {rank}"),
            background=Background(),
        )

    with ThreadPoolExecutor(num_particles) as pool:
        return list(pool.map(make, range(num_particles)))


class Particles:
    """Runs one function on P threads. Groups are kept until a run fails, as collectives then break."""

    def __init__(self) -> None:
        self._worlds: dict[int, list[Any]] = {}

    def run(self, num_particles: int, bucket_bytes: int, job: Callable[[Exchange], Any]) -> list[Any]:
        worlds = self._worlds.pop(num_particles, None) or make_worlds(num_particles)
        with ThreadPoolExecutor(num_particles) as pool:
            results = list(pool.map(lambda world: job(Exchange(world, bucket_bytes / 2**20)), worlds))
        self._worlds[num_particles] = worlds
        return results


@pytest.fixture(scope="module")
def particles() -> Particles:
    return Particles()


BYTES = {torch.float32: 4, torch.float64: 8}  # of an element on the wire
# Integers up to this are exact in the dtype, and so are their sums on the wire.
EXACT_UP_TO = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**20, torch.float64: 2**40}

spec = st.tuples(
    st.one_of(st.integers(0, 3), st.integers(0, 80)),
    st.sampled_from(list(EXACT_UP_TO)),
)
specs = st.lists(spec, max_size=6)
bucket_sizes = st.sampled_from([1, 3, 4, 12, 64, 100, 4096])


@st.composite
def dyadic_weights(draw: st.DrawFn, num_particles: int) -> list[float]:
    """Weights under which sums of integers are exact; not all zero."""
    weights = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=num_particles, max_size=num_particles)
    return draw(weights.filter(any))


@st.composite
def real_weights(draw: st.DrawFn, num_particles: int) -> list[float]:
    """Any weights that sum to one."""
    shares = st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]), min_size=num_particles, max_size=num_particles)
    drawn = draw(shares.filter(any))
    return [share / sum(drawn) for share in drawn]


def distinct_integers(shapes: list[tuple[int, torch.dtype]], particle: int) -> list[Tensor]:
    """Values that tell particle, tensor and element apart as far as the dtype can."""
    counter = itertools.count(1)
    return [
        torch.tensor(
            [(next(counter) * 7 + particle * 1009) % EXACT_UP_TO[dtype] for _ in range(numel)], dtype=torch.float64
        ).to(dtype)
        for numel, dtype in shapes
    ]


def overwrite(pairs: Iterator[tuple[Any, Tensor]], tensors: list[Tensor]) -> list[list[int]]:
    """Consume as the synchronizer does, in place; returns how often each element was visited."""
    visits = [torch.zeros(t.numel(), dtype=torch.int64) for t in tensors]
    for piece, received in pairs:
        target = piece.of(tensors[piece.tensor])
        assert received.dtype == target.dtype
        assert received.shape == target.shape
        target.copy_(received)
        piece.of(visits[piece.tensor]).add_(1)
    return [count.tolist() for count in visits]


def bucket_nbytes(shapes: list[tuple[int, torch.dtype]], bucket_bytes: int) -> list[int]:
    """Bytes of each bucket; for each dtype on the wire, all are full but the last."""
    sizes = []
    for dtype, itemsize in BYTES.items():
        numel = sum(n for n, d in shapes if wire_dtype(torch.zeros(0, dtype=d)) == dtype)
        capacity = max(1, bucket_bytes // itemsize)
        full, rest = divmod(numel, capacity)
        sizes += [capacity * itemsize] * full + [rest * itemsize] * (rest > 0)
    return sizes


def assert_same_bits(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def oracle_mean(contents: list[list[Tensor]], weights: list[float]) -> list[np.ndarray]:
    """In float64, of the particles that have a weight."""
    return [
        sum(w * t.double().numpy() for w, t in zip(weights, tensors, strict=True) if w != 0)
        for tensors in zip(*contents, strict=True)
    ]


@relaxed
@given(
    st.integers(1, 4).flatmap(lambda p: st.tuples(st.just(p), dyadic_weights(p))),
    specs,
    bucket_sizes,
)
def test_weighted_mean_reduces_every_element_exactly_once(particles, group, shapes, bucket_bytes):
    num_particles, weights = group
    contents = [distinct_integers(shapes, particle) for particle in range(num_particles)]
    expected = [torch.from_numpy(np.atleast_1d(m)) for m in oracle_mean(contents, weights)]

    def job(exchange: Exchange) -> tuple[list[Tensor], list[list[int]], int]:
        mine = [t.clone() for t in contents[exchange.particle]]
        if weights[exchange.particle] == 0:
            mine = [torch.full_like(t, math.nan) for t in mine]  # dead
        visits = overwrite(exchange.weighted_mean(mine, weights), mine)
        return mine, visits, exchange.bytes_received

    results = particles.run(num_particles, bucket_bytes, job)
    assert_same_bits([tensors for tensors, _, _ in results])
    for tensors, visits, received in results:
        assert visits == [[1] * numel for numel, _ in shapes]
        for tensor, (_, dtype), mean in zip(tensors, shapes, expected, strict=True):
            # The sum is exact on the wire, so that only the last cast rounds.
            assert torch.equal(tensor, mean.to(wire_dtype(tensor)).to(dtype))
        share = 2 * (num_particles - 1) / num_particles
        assert received == sum(round(share * nbytes) for nbytes in bucket_nbytes(shapes, bucket_bytes))


@relaxed
@given(
    st.integers(2, 4).flatmap(lambda p: st.tuples(st.just(p), real_weights(p))),
    specs,
    bucket_sizes,
    st.integers(0, 2**32 - 1),
)
def test_weighted_mean_of_real_numbers_is_right_to_rounding(particles, group, shapes, bucket_bytes, seed):
    num_particles, weights = group
    rng = np.random.default_rng(seed)
    contents = [
        [torch.tensor(rng.normal(size=n).tolist()).to(dtype) for n, dtype in shapes] for _ in range(num_particles)
    ]

    def job(exchange: Exchange) -> list[Tensor]:
        mine = [t.clone() for t in contents[exchange.particle]]
        overwrite(exchange.weighted_mean(mine, weights), mine)
        return mine

    results = particles.run(num_particles, bucket_bytes, job)
    assert_same_bits(results)
    for tensor, (_, dtype), mean in zip(results[0], shapes, oracle_mean(contents, weights), strict=True):
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(tensor.double().numpy(), mean, rtol=2 * eps, atol=8 * eps)


@relaxed
@given(
    st.integers(1, 4).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p - 1))),
    specs,
    bucket_sizes,
)
def test_from_one_copies_the_source_and_nothing_else(particles, group, shapes, bucket_bytes):
    num_particles, source = group
    expected = distinct_integers(shapes, source)

    def job(exchange: Exchange) -> tuple[list[Tensor], list[list[int]], int]:
        alive = exchange.particle == source
        mine = [t.clone() if alive else torch.full_like(t, math.nan) for t in expected]
        visits = overwrite(exchange.from_one(mine, source), mine)
        return mine, visits, exchange.bytes_received

    results = particles.run(num_particles, bucket_bytes, job)
    for particle, (tensors, visits, received) in enumerate(results):
        assert visits == [[1] * numel for numel, _ in shapes]
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
        assert received == (0 if particle == source else sum(bucket_nbytes(shapes, bucket_bytes)))


@relaxed
@given(
    st.integers(1, 4).flatmap(lambda p: st.lists(st.integers(0, p - 1), min_size=p, max_size=p)),
    specs,
    bucket_sizes,
)
@example([0, 0, 0], [(5, torch.float32)], 12)  # all from one
@example([0, 1, 2, 3], [(5, torch.float32)], 12)  # each from itself
@example([1, 2, 3, 0], [(5, torch.float32)], 12)  # round the ring
@example([3, 3, 1, 1], [(5, torch.float64), (3, torch.bfloat16)], 4)  # two askers each, two whom nobody asks
def test_from_each_brings_everybody_the_tensors_asked_for(particles, sources, shapes, bucket_bytes):
    num_particles = len(sources)
    contents = [distinct_integers(shapes, particle) for particle in range(num_particles)]

    def job(exchange: Exchange) -> tuple[list[Tensor], list[list[int]], int]:
        me = exchange.particle
        # Whom nobody asks may hold anything.
        mine = [t.clone() if me in sources else torch.full_like(t, math.nan) for t in contents[me]]
        visits = overwrite(exchange.from_each(mine, sources), mine)
        return mine, visits, exchange.bytes_received

    results = particles.run(num_particles, bucket_bytes, job)
    for particle, (tensors, visits, received) in enumerate(results):
        source = sources[particle]
        assert visits == [[1] * numel for numel, _ in shapes]
        assert all(torch.equal(a, b) for a, b in zip(tensors, contents[source], strict=True))
        assert received == (0 if particle == source else sum(bucket_nbytes(shapes, bucket_bytes)))


def test_what_nobody_else_has_asked_for_is_not_sent(particles):
    """A ring in which all but one look at themselves moves one tensor, not P of them."""
    sent = []

    def job(exchange: Exchange) -> None:
        group = exchange.world.peers.group

        class Spy:
            def alltoall_base(self, arrived: Tensor, given: Tensor, *splits: Any) -> Any:
                sent.append((exchange.particle, given.numel(), arrived.numel()))
                return group.alltoall_base(arrived, given, *splits)

        exchange.world.peers.group = Spy()
        try:
            list(exchange.from_each([torch.zeros(10)], [0, 1, 1]))
        finally:
            exchange.world.peers.group = group

    particles.run(3, 4096, job)
    assert sorted(sent) == [(0, 0, 0), (1, 10, 0), (2, 0, 10)]


# -- few bytes ------------------------------------------------------------------------------

sizes = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 3000)), min_size=1, max_size=4)
small_buckets = st.sampled_from([1, 4096, 10_000, 2**20])


@dataclass
class Round:
    """What a sync point of all particles began and ended with: flat, of each particle."""

    x: list[Tensor]
    weights: list[float]
    residual_before: list[Tensor]
    residual_after: list[Tensor]
    received: list[Tensor]
    common: list[Tensor]
    bytes_received: list[int]


def meet_by_differences(
    particles: Particles, form: str, numels: list[int], bucket_bytes: int, rounds: list[list[float]], seed: int
) -> list[Round]:
    """Particles that wander, and take what they receive."""
    num_particles = len(rounds[0])
    flat = torch.cat

    def job(exchange: Exchange) -> list[tuple[Any, ...]]:
        me = exchange.particle
        rng = np.random.default_rng([seed, me])
        x = [torch.linspace(-1, 1, n) for n in numels]
        differences = Differences(find_format(form), x)
        seen = []
        for weights in rounds:
            for t in x:
                t.add_(torch.from_numpy(rng.normal(size=t.numel()).astype(np.float32)), alpha=0.01)
            brought, residual, bytes_before = flat(x), flat(differences.residual), exchange.bytes_received
            if weights[me] == 0:
                x = [torch.full_like(t, math.nan) for t in x]  # dead
            visits = overwrite(exchange.mean_by_differences(x, weights, differences, feedback=True), x)
            assert visits == [[1] * n for n in numels]
            received = exchange.bytes_received - bytes_before
            seen.append((brought, residual, flat(differences.residual), flat(x), flat(differences.common), received))
        return seen

    results = particles.run(num_particles, bucket_bytes, job)
    columns = ([list(part) for part in zip(*seen, strict=True)] for seen in zip(*results, strict=True))
    return [
        Round(brought, weights, before, after, received, common, nbytes)
        for weights, (brought, before, after, received, common, nbytes) in zip(rounds, columns, strict=True)
    ]


@relaxed
@given(
    st.sampled_from(DENSE),
    sizes,
    small_buckets,
    st.integers(2, 4).flatmap(lambda p: st.lists(real_weights(p), min_size=1, max_size=4)),
    st.integers(0, 2**32 - 1),
)
def test_in_the_sum_over_the_particles_nothing_is_lost(particles, form, numels, bucket_bytes, rounds, seed):
    """received + all that is owed = the exact mean + all that was owed."""
    for sync_point in meet_by_differences(particles, form, numels, bucket_bytes, rounds, seed):
        assert_same_bits([[t] for t in sync_point.received])
        assert_same_bits([[sync_point.received[0]], *[[t] for t in sync_point.common]])
        mean = oracle_mean([[t] for t in sync_point.x], sync_point.weights)[0]
        residual_before, residual_after = (
            sum(t.double().numpy() for t in residual)
            for residual in (sync_point.residual_before, sync_point.residual_after)
        )
        np.testing.assert_allclose(
            sync_point.received[0].double().numpy() + residual_after, mean + residual_before, rtol=0, atol=1e-6
        )


@relaxed
@given(st.sampled_from(["int8", "int4"]), st.integers(2, 4), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_little_is_left_over(particles, form, num_particles, numel, seed):
    """However many sync points: half a step of what a particle sends, and of the sum that it sends on."""
    rounds = [[1 / num_particles] * num_particles] * 6
    levels = find_format(form).levels
    for sync_point in meet_by_differences(particles, form, [numel], 2**20, rounds, seed):
        for residual in sync_point.residual_after:
            # Weights differ by less than 0.1 from what all know, and with them what is sent.
            assert float(residual.abs().max()) <= 0.1 / levels


@relaxed
@given(st.sampled_from(DENSE), st.integers(2, 4), sizes, small_buckets)
def test_bytes_do_not_grow_with_the_number_of_particles(particles, form, num_particles, numels, bucket_bytes):
    weights = [1 / num_particles] * num_particles
    (sync_point,) = meet_by_differences(particles, form, numels, bucket_bytes, [weights], 0)
    unit = num_particles * BLOCK
    capacity = max(1, bucket_bytes // (4 * unit)) * unit
    full, rest = divmod(sum(numels), capacity)
    padded = full * capacity + math.ceil(rest / unit) * unit
    # Two phases, in each of which all parts but one's own arrive.
    expected = 2 * (num_particles - 1) * find_format(form).nbytes(padded) // num_particles
    assert sync_point.bytes_received == [expected] * num_particles


@pytest.mark.parametrize("form", DENSE)
def test_a_mean_that_may_be_thrown_away_leaves_no_trace(particles, form):
    def job(exchange: Exchange) -> tuple[Tensor, Differences]:
        x = [torch.full((300,), 1.0 + exchange.particle)]
        differences = Differences(find_format(form), [torch.ones(300)])
        differences.residual[0].fill_(7.0)  # of an earlier message; not for this one
        overwrite(exchange.mean_by_differences(x, [0.25, 0.75], differences, feedback=False), x)
        return x[0], differences

    for x, differences in particles.run(2, 4096, job):
        torch.testing.assert_close(x, torch.full((300,), 1.75), rtol=0.01, atol=0)
        assert differences.common[0].eq(1).all()
        assert differences.residual[0].eq(7).all()


@settings(relaxed, max_examples=15)
@given(
    st.sampled_from(DENSE),
    st.integers(1, 4).flatmap(lambda p: st.lists(st.integers(0, p - 1), min_size=6, max_size=6).map(lambda s: (p, s))),
    sizes,
    small_buckets,
)
def test_from_one_by_differences_closes_in_on_the_source(particles, form, group, numels, bucket_bytes):
    """All get the same bits; what is rounded away is a part of the next difference, so repeating leaves no error."""
    num_particles, sources = group

    def job(exchange: Exchange) -> tuple[list[list[Tensor]], list[int]]:
        start = [torch.zeros(n) for n in numels]
        differences, seen, nbytes = Differences(find_format(form), start), [], []
        for source in [*sources, *[0] * (110 if form == "int2" else 14)]:  # two bits close in more slowly
            mine = [torch.linspace(1, 2, n) + source for n in numels]
            if exchange.particle != source:
                mine = [torch.full_like(t, math.nan) for t in mine]
            before = exchange.bytes_received
            overwrite(exchange.from_one_by_differences(mine, source, differences), mine)
            nbytes.append(exchange.bytes_received - before)
            seen.append(mine)
        return seen, nbytes

    results = particles.run(num_particles, bucket_bytes, job)
    for number in range(len(sources)):
        assert_same_bits([seen[number] for seen, _ in results])
    unit = num_particles * BLOCK
    capacity = max(1, bucket_bytes // (4 * unit)) * unit
    padded = sum(numels) // capacity * capacity + -(-(sum(numels) % capacity) // unit) * unit
    for particle, (seen, nbytes) in enumerate(results):
        for t in seen[-1]:
            torch.testing.assert_close(t, torch.linspace(1, 2, t.numel()), rtol=0, atol=1e-6)
        assert nbytes[0] == (find_format(form).nbytes(padded) if particle != sources[0] else 0)


@relaxed
@given(
    st.integers(1, 4),
    st.lists(st.floats(width=64), min_size=1, max_size=4),
)
def test_all_gather_is_exact(particles, num_particles, values):
    def job(exchange: Exchange) -> tuple[list[list[float]], int]:
        return exchange.all_gather([*values, float(exchange.particle)]), exchange.bytes_received

    expected = np.array([[*values, float(particle)] for particle in range(num_particles)])
    for rows, received in particles.run(num_particles, 64, job):
        assert np.array(rows).tobytes() == expected.tobytes()  # -0.0 and NaN, too
        assert received == 8 * (len(values) + 1) * (num_particles - 1)


def test_bytes_of_a_group_add_up_to_the_whole_traffic(particles):
    shapes = [(1000, torch.float32), (500, torch.float64)]
    nbytes = 1000 * 4 + 500 * 8

    def job(exchange: Exchange) -> list[int]:
        counts = [0]
        for move in (lambda t: exchange.weighted_mean(t, [0.25] * 4), lambda t: exchange.from_one(t, 2)):
            list(move(distinct_integers(shapes, exchange.particle)))
            counts.append(exchange.bytes_received)
        return np.diff(counts).tolist()

    totals = np.sum(particles.run(4, 4096, job), axis=0)
    assert totals.tolist() == [2 * nbytes * 3, nbytes * 3]


def test_what_was_yielded_may_be_overwritten_and_what_was_not_is_still_read(particles):
    """Garbage written over each piece once it is consumed must not reach the pieces that follow."""

    def job(exchange: Exchange) -> list[float]:
        (mine,) = distinct_integers([(100, torch.float32)], exchange.particle)
        seen = []
        for piece, received in exchange.weighted_mean([mine], [0.5, 0.5]):
            seen += received.tolist()
            piece.of(mine).fill_(math.nan)
        return seen

    contents = [distinct_integers([(100, torch.float32)], particle) for particle in range(2)]
    expected = oracle_mean(contents, [0.5, 0.5])[0].tolist()
    assert particles.run(2, 28, job) == [expected, expected]


def test_the_bucket_bounds_the_memory_of_an_exchange(particles, monkeypatch):
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, **kwargs: allocated.append(n) or empty(n, **kwargs))
    particles.run(1, 64, lambda exchange: list(exchange.weighted_mean([torch.zeros(1000)], [1.0])))
    assert allocated == [64 // 4]


def test_a_peer_that_does_not_come_is_named():
    worlds = make_worlds(3, timeout_s=0.5)
    exchange = Exchange(worlds[0], 1.0)
    with pytest.raises(PeerError) as caught:
        list(exchange.weighted_mean([torch.ones(4)], [0.5, 0.5, 0.0]))
    message = str(caught.value)
    assert message.startswith("particle 0: the all-reduce with its peers broke")
    assert "particle 1; particle 2" in message
    assert "swarm.timeout_s" in message
    assert "\n" not in message
    assert not caught.value.agreed
    assert exchange.bytes_received == 0
