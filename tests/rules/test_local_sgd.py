"""Local SGD against the mean, and against synchronous SGD."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from .simulation import Simulation, make_rule, relaxed, sync_points


@relaxed
@given(
    st.integers(1, 5).flatmap(lambda p: st.lists(sync_points(p), min_size=1, max_size=4)),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_everybody_takes_the_mean_of_the_living(rounds, numel, seed):
    rng = np.random.default_rng(seed)
    num_particles = len(rounds[0][0])
    swarm = Simulation(make_rule("local_sgd"), torch.zeros(numel, dtype=torch.float64), num_particles)
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else float("nan")
        expected = swarm.array()[np.array(alive)].mean(axis=0)
        swarm.sync(fitness, alive)
        np.testing.assert_allclose(swarm.array(), np.tile(expected, (num_particles, 1)), rtol=1e-12, atol=1e-12)


def test_sync_point_after_every_step_equals_synchronous_sgd():
    """f_i(x) = ||x - t_i||^2 / 2: one step each and a mean is one step on the mean of the f_i."""
    rng = np.random.default_rng(0)
    targets, learning_rate = rng.normal(size=(4, 6)), 0.1
    swarm = Simulation(make_rule("local_sgd"), torch.zeros(6, dtype=torch.float64), 4)
    synchronous = np.zeros(6)
    for _ in range(100):
        for x, target in zip(swarm.x, targets, strict=True):
            x -= learning_rate * (x - torch.from_numpy(target))
        swarm.sync([0.0] * 4)
        synchronous -= learning_rate * (synchronous - targets).mean(axis=0)
        np.testing.assert_allclose(swarm.array()[2], synchronous, rtol=1e-12)
    np.testing.assert_allclose(synchronous, targets.mean(axis=0), atol=1e-4)


def test_keeps_no_state_and_needs_no_fitness():
    rule = make_rule("local_sgd")
    assert rule.init_state(torch.ones(3)) == {}
    assert not rule.uses_fitness
