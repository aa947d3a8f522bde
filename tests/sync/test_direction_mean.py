"""RDA against its equation in NumPy, for matrices whose parts lie on any number of ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_pso.shards import Segment
from ds_pso.shards.experts import whole_parameters
from ds_pso.sync.direction_mean import DirectionMean, matrices

NUMELS = {"plain": 7, "one": 12, "two": 40}  # in the order in which they lie in the model; the first is no matrix
NAMES = ["one", "two"]


class Meeting:
    """All of a group say something, and each hears all, in the order of their numbers."""

    def __init__(self, size: int) -> None:
        self._barrier, self._said = threading.Barrier(size, timeout=20), [[math.nan]] * size

    def hear(self, number: int, values: Sequence[float]) -> list[list[float]]:
        self._said[number] = list(values)
        self._barrier.wait()
        heard = list(self._said)
        self._barrier.wait()
        return heard


class Voice:
    """As an exchange, and as a local group."""

    def __init__(self, meeting: Meeting, number: int) -> None:
        self.all_gather = self.gather = lambda values: meeting.hear(number, values)


def on_all_ranks(particles: int, size: int, job: Callable[[int, int, Any, Any], Any]) -> list[list[Any]]:
    """What ``job(particle, rank, exchange, local)`` returned, by particle and rank."""
    peers, mates = [Meeting(particles) for _ in range(size)], [Meeting(size) for _ in range(particles)]
    with ThreadPoolExecutor(particles * size) as threads:
        futures = [
            [threads.submit(job, p, s, Voice(peers[s], p), Voice(mates[p], s)) for s in range(size)]
            for p in range(particles)
        ]
        return [[future.result() for future in row] for row in futures]


def segments_of(begin: int, end: int) -> list[Segment]:
    """Of a rank that holds the elements [begin, end) of the model."""
    found, offset = [], 0
    for name, numel in NUMELS.items():
        start, stop = max(begin, offset), min(end, offset + numel)
        if start < stop:
            found.append(Segment(name, 0, start - begin, start - offset, stop - start))
        offset += numel
    return found


def expected(x: np.ndarray, origin: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Of particles (P, n), all alive."""
    mean, offset = np.tensordot(weights, x, 1), 0
    for name, numel in NUMELS.items():
        window = slice(offset, offset + numel)
        offset += numel
        if name in NAMES:
            v = x[:, window] - origin[window]
            lengths = np.linalg.norm(v, axis=1)
            direction = np.tensordot(weights, v / lengths[:, None], 1)
            mean[window] = origin[window] + weights @ lengths * direction / np.linalg.norm(direction)
    return mean


def merge(x: np.ndarray, origin: np.ndarray, weights: Sequence[float], size: int) -> list[np.ndarray]:
    """The merged model, as each particle's ranks have it."""
    total = sum(NUMELS.values())
    bounds = [total * rank // size for rank in range(size + 1)]
    scaled: dict[tuple[int, int], Tensor] = {}
    done = [threading.Barrier(len(x), timeout=20) for _ in range(size)]

    def job(particle: int, rank: int, exchange: Any, local: Any) -> np.ndarray:
        begin, end = bounds[rank], bounds[rank + 1]
        own, start = torch.tensor(x[particle, begin:end]), torch.tensor(origin[begin:end])
        merger = DirectionMean(exchange, local, segments_of(begin, end), NAMES)
        lengths = merger.equalise([own], [start], weights)
        scaled[particle, rank] = own
        done[rank].wait()
        mean = sum(w * scaled[p, rank] for p, w in enumerate(weights) if w != 0)
        merger.stretch([mean], [start], lengths)
        return mean.numpy()

    return [np.concatenate(ranks) for ranks in on_all_ranks(len(x), size, job)]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_it_is_the_equation_however_the_model_is_cut(particles: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    origin = rng.normal(size=sum(NUMELS.values()))
    x = origin + rng.normal(size=(particles, len(origin))) * rng.uniform(0.1, 10, size=(particles, 1))
    weights = rng.dirichlet(np.ones(particles))
    for merged in merge(x, origin, weights, size):
        np.testing.assert_allclose(merged, expected(x, origin, weights), rtol=1e-9, atol=1e-9)


def test_who_does_not_count_may_hold_anything() -> None:
    rng = np.random.default_rng(1)
    origin, weights = rng.normal(size=sum(NUMELS.values())), [0.5, 0.0, 0.5]
    x = origin + rng.normal(size=(3, len(origin)))
    x[1] = np.nan
    for merged in merge(x, origin, weights, 2):
        np.testing.assert_allclose(merged, expected(x[::2], origin, [0.5, 0.5]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("movements", [(0.0, 0.0), (1.0, -1.0), (0.0, 1.0)])
def test_movements_without_a_direction_leave_the_mean_as_it_is_or_finite(movements: tuple[float, float]) -> None:
    origin = np.zeros(sum(NUMELS.values()))
    x = np.stack([origin + movement for movement in movements])
    for merged in merge(x, origin, [0.5, 0.5], 2):
        assert np.isfinite(merged).all()
        assert merged == pytest.approx(np.mean(movements))


def test_embeddings_and_vectors_are_no_matrices() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.last = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5)
            self.conv, self.frozen, self.tied = nn.Conv1d(3, 3, 2), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
            self.tied.weight = self.embed.weight

    class Shards:
        module = Model()
        whole = whole_parameters(module)

        def trained_names(self) -> set[str]:
            return {name for name, _ in self.module.named_parameters() if "frozen" not in name}

    assert matrices(Shards()) == ["conv.weight", "last.weight"]  # type: ignore[arg-type]
