"""The wire ``sparse``: the largest of each chunk, and a mean over those who have sent an element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comm.test_exchange import Particles, assert_same_bits
from ds_pso.comm.compression import Differences, PartialFormat, find_format
from ds_pso.comm.compression.sparse_options import CHUNK, SparseOptions
from ds_pso.comm.exchange import Exchange
from ds_pso.rules import LocalSGD, Rule, SyncPoint, find_rule
from ds_pso.sync.update import Updater

relaxed = settings(deadline=None, max_examples=30)
any_options = st.builds(
    SparseOptions,
    density=st.sampled_from([0.0001, 0.004, 1 / 64, 0.1, 0.5]),
    bits=st.sampled_from([1, 2, 16]),
)


@pytest.fixture(scope="module")
def particles() -> Particles:
    return Particles()


def make(options: SparseOptions) -> PartialFormat:
    form = find_format("sparse", options)
    assert isinstance(form, PartialFormat)
    return form


def oracle(values: np.ndarray, options: SparseOptions) -> np.ndarray:
    """What arrives, chunk by chunk, in float64; the means are rounded to bf16."""
    arrived = np.zeros(values.shape)
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK].astype(np.float64)
        kept = np.argsort(-np.abs(chunk), kind="stable")[: options.kept]
        size, sign = np.abs(chunk[kept]), np.where(chunk[kept] < 0, -1.0, 1.0)
        if options.bits == 16:
            size = bf16(size)
        else:
            groups = size > size.mean() if options.bits == 2 else np.zeros(len(size), bool)
            for group in (groups, ~groups):
                if group.any():
                    size[group] = bf16(size[group].mean())
        arrived[start + kept] = sign * size
    return arrived


def bf16(values: Any) -> np.ndarray:
    return torch.as_tensor(values, dtype=torch.float32).bfloat16().double().numpy()


def numbers(rng: np.random.Generator, numel: int) -> np.ndarray:
    return (rng.standard_t(4, numel) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)


@relaxed
@given(any_options, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_largest_of_each_chunk_arrive(options, chunks, seed):
    values = numbers(np.random.default_rng(seed), chunks * CHUNK)
    form = make(options)
    encoded = torch.full((form.nbytes(len(values)),), 255, dtype=torch.uint8)
    assert len(encoded) == chunks * options.chunk_bytes
    form.encode(torch.from_numpy(values.copy()), encoded)
    arrived = torch.full((len(values),), math.nan)
    form.decode(encoded, arrived)
    expected = oracle(values, options)
    assert np.array_equal(arrived.numpy() != 0, expected != 0)
    # A sum in fp32 may fall on the other side of a bf16.
    np.testing.assert_allclose(arrived.numpy(), expected, rtol=2**-7)


@relaxed
@given(any_options, st.integers(0, 2**32 - 1))
def test_what_is_left_and_what_arrives_make_the_whole(options, seed):
    values = torch.from_numpy(numbers(np.random.default_rng(seed), 2 * CHUNK))
    form, left = make(options), values.clone()
    encoded = torch.empty(form.nbytes(len(values)), dtype=torch.uint8)
    form.encode_and_subtract(left, encoded)
    arrived, total, weights = torch.empty_like(values), torch.zeros_like(values), torch.zeros_like(values)
    form.decode(encoded, arrived)
    assert torch.equal(left, values - arrived)
    form.add_sent(encoded, 0.5, total, weights)
    form.add_sent(encoded, 0.25, total, weights)
    torch.testing.assert_close(total, 0.75 * arrived)
    assert torch.equal(weights, 0.75 * (arrived != 0))
    again = torch.empty_like(encoded)
    form.encode(arrived, again)
    form.decode(again, total)
    assert torch.equal(total, arrived), "what has been rounded is not rounded again"


@pytest.mark.parametrize(
    ("density", "kept"), [(1e-9, 8), (8 / CHUNK, 8), (0.004, 16), (1 / 64, 64), (0.0313, 128), (0.5, 2048)]
)
def test_how_many_are_kept(density, kept):
    assert SparseOptions(density=density).kept == kept


def test_chunks_of_zeros_and_of_equal_numbers():
    values = torch.cat([torch.zeros(CHUNK), torch.full((CHUNK,), -3.0)])
    form = make(SparseOptions())
    encoded, arrived = torch.empty(form.nbytes(2 * CHUNK), dtype=torch.uint8), torch.empty(2 * CHUNK)
    form.encode(values, encoded)
    form.decode(encoded, arrived)
    assert not arrived[:CHUNK].any()
    assert sorted(arrived[CHUNK:].tolist()) == [-3.0] * 64 + [0.0] * (CHUNK - 64)


# -- a series of syncs --------------------------------------------------------------------------------

SIZES = [5000, 300, 4000]  # 3 chunks, the last one not full


def weights_of(alive: list[bool]) -> tuple[float, ...]:
    return SyncPoint(0, (0.0,) * len(alive), tuple(alive)).mean_weights()


class Oracle:
    """P particles that sync by the equations of the docs, in float64."""

    def __init__(
        self, num_particles: int, options: SparseOptions, decay: float, *, in_weights: bool, numel: int = sum(SIZES)
    ) -> None:
        self.common = np.zeros(numel)
        self.residual = [np.zeros(numel) for _ in range(num_particles)]
        self.options, self.decay, self.in_weights = options, decay, in_weights

    def sync(self, x: list[np.ndarray], alive: list[bool], lr: float) -> list[np.ndarray]:
        """The weights after a sync."""
        total, senders = np.zeros_like(self.common), np.zeros_like(self.common)
        left = []
        for i, mine in enumerate(x):
            if not alive[i]:
                left.append(np.zeros_like(self.common))
                continue
            e = mine - self.common
            if not self.in_weights:
                e += self.decay * self.residual[i]
            padded = np.concatenate([e, np.zeros(-len(e) % CHUNK)]).astype(np.float32)
            sent = oracle(padded, self.options)[: len(e)]
            self.residual[i] = e - sent
            left.append(e - sent)
            total += sent
            senders += sent != 0
        mean = total / np.maximum(senders, 1)
        self.common = self.common + lr * mean
        return [self.common + (rest if self.in_weights else 0) for rest in left]


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat(tensors).double().numpy()


def sync_all(
    particles: Particles,
    rule: Rule,
    options: SparseOptions,
    decay: float,
    rounds: list[list[bool]],
    bucket_bytes: int,
    *,
    in_weights: bool,
) -> list[list[list[Tensor]]]:
    """The weights of every particle after each sync: [round][particle][tensor]. What they learn is ``moves``."""

    def job(exchange: Exchange) -> list[list[Tensor]]:
        x = [torch.zeros(n) for n in SIZES]
        differences = Differences(make(options), x, in_weights=in_weights, decay=decay)
        state = [rule.init_state(t) for t in x]
        updater, seen = Updater(exchange, rule, [], state, differences), []
        for number, alive in enumerate(rounds):
            for t, move in zip(x, moves(number, exchange.particle), strict=True):
                t.add_(move)
                if not alive[exchange.particle]:
                    t.fill_(math.nan)
            plan = rule.plan(SyncPoint(number, (0.0,) * len(alive), tuple(alive)), {})
            updater.carry_out(plan, x)
            updater.take_distance()
            seen.append([t.clone() for t in x])
        return seen

    results = particles.run(len(rounds[0]), bucket_bytes, job)
    return [list(of_round) for of_round in zip(*results, strict=True)]


def moves(number: int, particle: int) -> list[Tensor]:
    rng = np.random.default_rng([number, particle])
    return [torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in SIZES]


def check_against_the_oracle(
    found: list[list[list[Tensor]]], oracle: Oracle, rounds: list[list[bool]], lr: float
) -> None:
    x = [np.zeros(sum(SIZES)) for _ in rounds[0]]
    for number, alive in enumerate(rounds):
        x = [mine + flat(moves(number, i)) for i, mine in enumerate(x)]
        x = oracle.sync(x, alive, lr)
        for mine, expected in zip(found[number], x, strict=True):
            # Where two sizes are nearly equal, fp32 may choose the other one: a few elements, and no more.
            wrong = np.abs(flat(mine) - expected) > 0.02 * (1 + np.abs(expected))
            assert wrong.mean() < 0.002, f"round {number}: {wrong.sum()} elements"


alive_rounds = st.integers(2, 4).flatmap(
    lambda p: st.lists(st.lists(st.booleans(), min_size=p, max_size=p).filter(any), min_size=2, max_size=4)
)


@relaxed
@given(any_options, st.sampled_from([1.0, 0.9]), alive_rounds, st.sampled_from([1, 20_000, 2**20]), st.booleans())
def test_a_series_of_syncs_is_that_of_the_equations(particles, options, decay, rounds, bucket_bytes, in_weights):
    decay = 1.0 if in_weights else decay
    rule = LocalSGD(LocalSGD.Config())
    found = sync_all(particles, rule, options, decay, rounds, bucket_bytes, in_weights=in_weights)
    if not in_weights:
        for of_round in found:
            assert_same_bits(of_round)
    check_against_the_oracle(found, Oracle(len(rounds[0]), options, decay, in_weights=in_weights), rounds, 1.0)


@pytest.mark.parametrize("in_weights", [False, True])
def test_an_outer_step_is_made_with_the_mean_of_those_who_sent(particles, in_weights):
    kind = find_rule("diloco")
    rule = kind(kind.Config.model_validate({"outer_lr": 0.5, "outer_momentum": 0.0}))
    options, rounds = SparseOptions(density=0.1), [[True] * 3] * 4
    found = sync_all(particles, rule, options, 1.0, rounds, 2**20, in_weights=in_weights)
    check_against_the_oracle(found, Oracle(3, options, 1.0, in_weights=in_weights), rounds, 0.5)


@pytest.mark.parametrize("num_particles", [1, 2, 4])
def test_each_peer_hears_from_every_other_one(particles, num_particles):
    form, numel = make(SparseOptions()), 3 * CHUNK + 1

    def job(exchange: Exchange) -> int:
        x = [torch.randn(numel)]
        differences = Differences(form, [torch.zeros(numel)])
        weights = [1 / num_particles] * num_particles
        assert list(exchange.mean_by_differences(x, weights, differences, feedback=True))
        return exchange.bytes_received

    expected = (num_particles - 1) * form.nbytes(4 * CHUNK)
    assert particles.run(num_particles, 2**20, job) == [expected] * num_particles
