"""NoSync against its equation in NumPy, and the pressure over training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.rules import Place, SyncPoint

from .simulation import Simulation, histories, make_rule, nosync_rules, relaxed, seeds


def pressures(total, **options):
    rule = make_rule("nosync", **options)
    points = [SyncPoint(i, (1.0, 2.0), (True, True), total=total) for i in range(total)]
    return [rule.plan(point, {}).note["pressure"] for point in points]


@relaxed
@given(nosync_rules, histories, st.integers(0, 20), seeds)
def test_follows_the_equation(rule, rounds, numel, seed):
    rng, o = np.random.default_rng(seed), rule.options
    num_particles, total = len(rounds[0][0]), 6
    swarm = Simulation(rule, torch.zeros(numel, dtype=torch.float64), num_particles, total=total)
    for index, (fitness, alive) in enumerate(rounds):
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else float("nan")
        t = (index + 1) / total
        p = {
            "linear": (1 - t) * o.pressure + t * o.final_pressure,
            "exponential": o.pressure ** (1 - t) * o.final_pressure**t,
            "constant": o.pressure,
        }[o.growth]
        before, living = swarm.array(), np.array(alive)
        mean = before[living].mean(axis=0)
        after = (1 - p) * before + p * mean
        after[~living] = mean
        swarm.sync(fitness, alive)
        np.testing.assert_allclose(swarm.array(), after, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_pressure_grows_to_its_end_and_then_all_agree(growth):
    values = pressures(10, pressure=0.05, growth=growth)
    assert values == sorted(values)
    assert values[0] > 0.05
    assert values[-1] == pytest.approx(1.0)
    swarm = Simulation(make_rule("nosync", pressure=0.05, growth=growth), torch.zeros(4), 3, total=10)
    for _ in range(10):
        for x in swarm.x:
            x += torch.randn(4)
        swarm.sync([1.0] * 3)
    np.testing.assert_allclose(swarm.array(), np.tile(swarm.array()[0], (3, 1)), atol=1e-6)


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_pressure_stays_at_its_end_when_training_goes_on(growth):
    rule = make_rule("nosync", final_pressure=0.5, growth=growth)
    assert rule.plan(SyncPoint(30, (1.0,), (True,), total=10), {}).note["pressure"] == pytest.approx(0.5)


def test_linear_grows_by_equal_differences_and_exponential_by_equal_ratios():
    linear, exponential = (np.array(pressures(8, pressure=0.1, growth=g)) for g in ("linear", "exponential"))
    np.testing.assert_allclose(np.diff(linear), np.diff(linear)[0])
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], exponential[1] / exponential[0])


def test_a_constant_pressure_needs_no_length_of_training():
    rule = make_rule("nosync", growth="constant", pressure=0.25)
    assert not rule.uses_progress
    assert rule.plan(SyncPoint(3, (1.0,), (True,)), {}).note == {"pressure": 0.25}


@pytest.mark.parametrize("pressure", [0.0, 0.5, 1.0])
def test_asynchronous_moves_towards_the_mean_of_two(pressure):
    """What the particle knows of others is nothing: it may not count for the plan."""
    rule = make_rule("nosync", asynchronous=True, growth="constant", pressure=pressure)
    assert rule.max_staleness == 4
    plan = rule.plan(SyncPoint(5, (0.5, float("nan")), (True, True)), {})
    assert plan.receive == "newest"
    x, message = torch.zeros(3), torch.full((3,), 4.0)
    rule.update(x, message, {}, plan, Place(0))
    assert x.tolist() == [pressure * 2.0] * 3  # the mean of the two is 2


def test_asynchronous_a_dead_particle_takes_the_message():
    rule = make_rule("nosync", asynchronous=True, growth="constant")
    plan = rule.plan(SyncPoint(0, (float("nan"), float("nan")), (True, False)), {})
    x = torch.full((2,), float("nan"))
    rule.update(x, torch.ones(2), {}, plan, Place(1))
    assert x.tolist() == [1.0, 1.0]
