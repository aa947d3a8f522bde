"""NoLoCo against its equations in NumPy, and what pairs are good for."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.rules import SyncPoint

from .simulation import Simulation, histories, make_rule, noloco_rules, relaxed, seeds


@relaxed
@given(noloco_rules, histories, st.integers(0, 20), seeds)
def test_follows_the_equations(rule, rounds, numel, seed):
    """delta <- alpha delta + beta mean(theta - phi) + gamma (mean(phi) - phi) over the pair, with gamma = beta."""
    rng, alpha, beta = np.random.default_rng(seed), rule.options.outer_momentum, rule.options.outer_lr
    start, num_particles = rng.normal(size=numel), len(rounds[0][0])
    swarm = Simulation(rule, torch.from_numpy(start.copy()), num_particles)
    phi, delta = np.tile(start, (num_particles, 1)), np.zeros((num_particles, numel))
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else float("nan")
        theta, before = swarm.array(), phi.copy()
        sources = swarm.sync(fitness, alive).sources
        for i, j in enumerate(sources):
            assert alive[j]
            if not alive[i]:
                phi[i], delta[i] = theta[j], 0.0
                continue
            assert sources[j] == i, "partners of each other"
            gradient = ((theta[i] - before[i]) + (theta[j] - before[j])) / 2
            delta[i] = alpha * delta[i] + beta * gradient + beta * ((before[i] + before[j]) / 2 - before[i])
            phi[i] = before[i] + delta[i]
        np.testing.assert_allclose(swarm.array(), phi, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(swarm.states("momentum"), delta, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 9), seeds)
def test_pairs_are_dealt_anew_and_all_meet(num_particles, seed):
    rule = make_rule("noloco", seed)
    met = Counter()
    for index in range(200):
        sources = rule.plan(SyncPoint(index, (1.0,) * num_particles, (True,) * num_particles), {}).sources
        assert [sources[j] for j in sources] == list(range(num_particles))
        assert sum(i == j for i, j in enumerate(sources)) == num_particles % 2
        met.update((i, j) for i, j in enumerate(sources) if i < j)
    assert len(met) == num_particles * (num_particles - 1) // 2


@pytest.mark.parametrize(("outer_lr", "outer_momentum"), [(0.7, 0.5), (1.0, 0.0), (0.5, 0.3)])
def test_without_training_all_come_together_where_their_mean_was(outer_lr, outer_momentum):
    swarm = Simulation(
        make_rule("noloco", outer_lr=outer_lr, outer_momentum=outer_momentum), torch.zeros(3, dtype=torch.float64), 6
    )
    for i, x in enumerate(swarm.x):
        x += i
    for state, x in zip(swarm.state, swarm.x, strict=True):
        state["anchor"].copy_(x)
    for index in range(300):
        swarm.sync([0.0] * 6)
        if index > 20 and outer_momentum == 0:
            assert swarm.array().mean() == pytest.approx(2.5)
    np.testing.assert_allclose(swarm.array(), 2.5, atol=1e-6)
