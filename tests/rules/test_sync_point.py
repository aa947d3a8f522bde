"""What particles conclude from each other's fitness."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.rules import SyncPoint

from .simulation import relaxed, sync_points

NAN, INF = math.nan, math.inf
points = st.integers(1, 8).flatmap(sync_points).map(lambda m: SyncPoint(0, tuple(m[0]), tuple(m[1])))


@relaxed
@given(points)
def test_mean_weights_are_equal_among_the_living_and_sum_to_one(point):
    weights = point.mean_weights()
    assert sum(weights) == pytest.approx(1.0)
    assert {w for w, alive in zip(weights, point.alive, strict=True) if not alive} <= {0.0}
    assert len({w for w, alive in zip(weights, point.alive, strict=True) if alive}) == 1


@relaxed
@given(points, st.data())
def test_mean_weights_follow_the_samples_of_the_living(point, data):
    size = point.num_particles
    samples = tuple(data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size)))
    living = sum(count for count, alive in zip(samples, point.alive, strict=True) if alive)
    weights = replace(point, samples=samples).mean_weights()
    if living == 0:
        assert weights == point.mean_weights()
        return
    for weight, count, alive in zip(weights, samples, point.alive, strict=True):
        assert weight == pytest.approx(count / living if alive else 0.0)


@relaxed
@given(points)
def test_best_weights_choose_one_living_particle_with_the_lowest_loss(point):
    weights = point.best_weights()
    best = weights.index(1.0)
    assert sorted(weights) == [0.0] * (point.num_particles - 1) + [1.0]
    assert point.alive[best]
    assert point.losses()[best] == min(point.losses())


@pytest.mark.parametrize(
    ("fitness", "alive", "best"),
    [
        ((2.0, 1.0, 3.0), (True, True, True), 1),
        ((1.0, 1.0, 1.0), (True, True, True), 0),
        ((2.0, 1.0, 1.0), (True, True, True), 1),
        ((NAN, 5.0, INF), (True, True, True), 1),
        ((-INF, 5.0, 6.0), (False, True, True), 1),  # a dead particle's boast does not count
        ((NAN, NAN, NAN), (True, True, True), 0),
        ((NAN, NAN, NAN), (False, True, True), 1),
        ((NAN, INF, NAN), (False, False, True), 2),
    ],
)
def test_best_weights_by_example(fitness, alive, best):
    assert SyncPoint(0, fitness, alive).best_weights().index(1.0) == best


def test_losses_make_nan_and_the_dead_the_worst():
    point = SyncPoint(0, (1.0, NAN, INF, -3.0), (True, True, True, False))
    assert point.losses() == [1.0, INF, INF, INF]
