"""PSO-PS against its equations in NumPy, its choice of the best, its random factors, and a quadratic."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.rules import SyncPoint

from .simulation import Simulation, make_rule, meetings, pso_rules, relaxed

NAN, INF = math.nan, math.inf


class NumpyPso:
    """Particle swarm optimisation as Kennedy and Eberhart, and arXiv 2009.03816, write it."""

    def __init__(self, start: np.ndarray, num_particles: int, inertia: float, all_time: bool) -> None:
        self.velocity = np.zeros((num_particles, start.size))
        self.best_position = np.tile(start, (num_particles, 1))
        self.best_loss = [INF] * num_particles
        self.inertia, self.all_time = inertia, all_time

    def sync(self, x: np.ndarray, fitness: list[float], alive: list[bool], pulls: list[tuple[float, float]]):
        """``pulls``: (c1 r1, c2 r2) of each particle."""
        loss = [INF if math.isnan(f) or not living else f for f, living in zip(fitness, alive, strict=True)]
        for i, living in enumerate(alive):
            if not living:
                self.best_loss[i] = INF  # it forgets
            elif loss[i] < self.best_loss[i]:
                self.best_loss[i], self.best_position[i] = loss[i], x[i]
        living = [i for i, yes in enumerate(alive) if yes]
        ranking = self.best_loss if self.all_time else loss
        source = min(living, key=lambda i: ranking[i])
        swarm_best = (self.best_position if self.all_time else x)[source].copy()
        for i, (own, social) in enumerate(pulls):
            if alive[i]:
                self.velocity[i] = (
                    self.inertia * self.velocity[i]
                    + own * (self.best_position[i] - x[i])
                    + social * (swarm_best - x[i])
                )
                x[i] = x[i] + self.velocity[i]
            else:
                x[i], self.velocity[i], self.best_position[i] = swarm_best, 0.0, swarm_best
        return source


@relaxed
@given(
    pso_rules,
    st.integers(1, 5).flatmap(lambda p: st.lists(meetings(p), min_size=1, max_size=6)),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_follows_the_equations(rule, rounds, numel, seed):
    rng, options = np.random.default_rng(seed), rule.options
    start, num_particles = rng.normal(size=numel), len(rounds[0][0])
    oracle = NumpyPso(start, num_particles, options.inertia, options.best == "all_time")
    swarm = Simulation(rule, torch.from_numpy(start.copy()), num_particles)
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else NAN
        expected = swarm.array()
        plan = swarm.sync(fitness, alive)
        pulls = [factors[1:] for factors in plan.factors]
        if options.randomness == "none":
            assert pulls == [(options.cognitive / 2, options.social / 2)] * num_particles
        assert oracle.sync(expected, fitness, alive, pulls) == plan.source
        np.testing.assert_allclose(swarm.array(), expected, rtol=1e-9, atol=1e-9)
        for name, values in {"velocity": oracle.velocity, "best_position": oracle.best_position}.items():
            for state, value in zip(swarm.state, values, strict=True):
                if name in state:
                    np.testing.assert_allclose(state[name].numpy(), value, rtol=1e-9, atol=1e-9)


# -- who is best ----------------------------------------------------------------------------


@pytest.mark.parametrize("best", ["window", "all_time"])
@pytest.mark.parametrize(
    ("fitness", "alive", "source"),
    [
        ((3.0, 1.0, 2.0), (True, True, True), 1),
        ((1.0, 1.0, 1.0), (True, True, True), 0),
        ((2.0, 1.0, 1.0), (True, True, True), 1),
        ((NAN, 9.0, INF), (True, True, True), 1),
        ((-9.0, 9.0, 8.0), (False, True, True), 2),
        ((NAN, NAN, NAN), (False, True, True), 1),
    ],
)
def test_the_source_is_the_first_living_particle_with_the_lowest_loss(best, fitness, alive, source):
    assert make_rule("pso", best=best).plan(SyncPoint(0, fitness, alive), {}).source == source


def test_window_forgets_and_all_time_remembers():
    """Particle 1 was best at first; at the second sync point particle 0 is, but not as good."""
    sources = {}
    for best in ("window", "all_time"):
        swarm = Simulation(make_rule("pso", best=best), torch.zeros(1), 2)
        sources[best] = [swarm.sync(fitness).source for fitness in [(5.0, 1.0), (2.0, 3.0)]]
    assert sources == {"window": [1, 0], "all_time": [1, 1]}


def test_all_time_sends_the_best_position_updated_first():
    swarm = Simulation(make_rule("pso", best="all_time", social=2.0), torch.zeros(1), 2)  # 2 r2 = 1: jump to g
    swarm.x[1] += 7.0
    swarm.sync((5.0, 1.0))  # found just now, so it must travel just now
    assert [x.item() for x in swarm.x] == [7.0, 7.0]
    swarm.x[1] += 1.0
    swarm.sync((5.0, 2.0))  # a worse place: 7 is still the best known
    assert [x.item() for x in swarm.x] == [7.0, 7.0]


def test_a_dead_particle_forgets_its_best():
    swarm = Simulation(make_rule("pso", best="all_time", cognitive=1.0), torch.zeros(1), 2)
    swarm.sync((1.0, 2.0))
    plan = swarm.sync((NAN, 3.0), (False, True))
    assert plan.source == 1
    assert plan.memory["best_fitness"] == [INF, 2.0]


# -- random factors -------------------------------------------------------------------------


def draws(seed=0, num_rounds=20, num_particles=4):
    """(r1, r2) of each sync point and particle, shape (rounds, P, 2)."""
    rule = make_rule("pso", seed=seed, cognitive=1.0, social=1.0, randomness="per_sync")
    alive = (True,) * num_particles
    plans = [rule.plan(SyncPoint(i, (0.0,) * num_particles, alive), {}) for i in range(num_rounds)]
    return np.array([[factors[1:] for factors in plan.factors] for plan in plans])


def test_factors_are_uniform_and_differ_by_seed_sync_particle_and_term():
    values = draws(num_rounds=300)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.unique(values).size == values.size
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert values.var() == pytest.approx(1 / 12, abs=0.01)
    correlations = np.corrcoef(values.reshape(300, -1), rowvar=False) - np.eye(8)
    assert np.abs(correlations).max() < 0.25
    assert np.intersect1d(values, draws(seed=1)).size == 0


def test_factors_depend_on_seed_sync_and_particle_alone():
    assert np.array_equal(draws(seed=5), draws(seed=5))
    assert np.array_equal(draws(num_particles=2), draws(num_particles=4)[:, :2])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, set()),
        ({"inertia": 0.5}, {"velocity"}),
        ({"cognitive": 0.5}, {"best_position"}),
        ({"best": "all_time"}, {"best_position"}),
        ({"inertia": 0.5, "cognitive": 0.5}, {"velocity", "best_position"}),
    ],
)
def test_keeps_only_the_state_its_options_need(options, names):
    assert make_rule("pso", **options).init_state(torch.ones(3)).keys() == names


# -- on a quadratic -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cognitive": 0.5},
        {"best": "all_time", "cognitive": 0.5, "inertia": 0.3},
        {"randomness": "per_sync", "cognitive": 0.5},
    ],
)
def test_particles_that_descend_and_meet_converge(options):
    """f(x) = ||x - x*||^2, noisy gradients; the particles end close to x* and to each other."""
    rng = np.random.default_rng(3)
    target = torch.from_numpy(rng.normal(size=10))
    swarm = Simulation(make_rule("pso", **options), torch.zeros_like(target), 4)
    start_loss = float((target**2).sum())
    for _ in range(40):
        for x in swarm.x:
            for _ in range(4):
                x -= 0.05 * (2 * (x - target) + 0.1 * torch.from_numpy(rng.normal(size=10)))
        swarm.sync([float(((x - target) ** 2).sum()) for x in swarm.x])
    losses = [float(((x - target) ** 2).sum()) for x in swarm.x]
    assert max(losses) < 1e-2 * start_loss
    distances = [float((a - b).norm()) for a, b in itertools.combinations(swarm.x, 2)]
    assert max(distances) < 0.1 * float(target.norm())


def test_a_swarm_without_gradients_finds_the_minimum_of_a_line():
    """Textbook PSO (w = 0.729, c1 = c2 = 1.494) from 20 random places."""
    rng = np.random.default_rng(4)
    rule = make_rule("pso", inertia=0.729, cognitive=1.494, social=1.494, best="all_time", randomness="per_sync")
    swarm = Simulation(rule, torch.zeros(1, dtype=torch.float64), 20)
    for x in swarm.x:
        x += float(rng.uniform(-10, 10))
    best = []
    for _ in range(100):
        plan = swarm.sync([float((x - 3.21) ** 2) for x in swarm.x])
        best.append(min(plan.memory["best_fitness"]))
    assert best == sorted(best, reverse=True)
    assert best[-1] < 1e-6
    np.testing.assert_allclose(swarm.array(), 3.21, atol=0.1)
