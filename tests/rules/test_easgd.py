"""EASGD against its equations in NumPy, and as the springs that it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .simulation import Simulation, easgd_rules, histories, make_rule, relaxed, seeds


@relaxed
@given(easgd_rules, histories, st.integers(0, 20), seeds)
def test_follows_the_equations(rule, rounds, numel, seed):
    """Equations 5 and 6 of arXiv 1412.6651 without the gradients, with alpha = beta / P; the dead are not there."""
    rng, beta = np.random.default_rng(seed), rule.options.beta
    center, num_particles = rng.normal(size=numel), len(rounds[0][0])
    swarm = Simulation(rule, torch.from_numpy(center.copy()), num_particles)
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else float("nan")
        before, alpha = swarm.array(), beta / sum(alive)
        after = before - alpha * (before - center)
        center = center + alpha * sum(before[i] - center for i in range(num_particles) if alive[i])
        after[~np.array(alive)] = center
        swarm.sync(fitness, alive)
        np.testing.assert_allclose(swarm.array(), after, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(swarm.states("center"), np.tile(center, (num_particles, 1)), rtol=1e-9, atol=1e-9)


def test_the_center_is_the_model():
    rule = make_rule("easgd")
    assert rule.model_in == "center"
    assert rule.init_state(torch.ones(3))["center"].tolist() == [1.0] * 3


@pytest.mark.parametrize("beta", [0.1, 0.9, 1.0])
def test_springs_pull_all_ends_together(beta):
    """Without training, what particles and centre hold together stays the same, and they end in one place."""
    swarm = Simulation(make_rule("easgd", beta=beta), torch.zeros(3, dtype=torch.float64), 4)
    for i, x in enumerate(swarm.x):
        x += i
    momentum = swarm.array().sum() + swarm.states("center")[0].sum()
    for _ in range(1000):
        swarm.sync([0.0] * 4)
        assert swarm.array().sum() + swarm.states("center")[0].sum() == pytest.approx(momentum)
    np.testing.assert_allclose(swarm.array(), momentum / 5 / 3, atol=1e-6)
    np.testing.assert_allclose(swarm.states("center"), momentum / 5 / 3, atol=1e-6)
