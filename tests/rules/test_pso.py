"""PSO-PS against its equations in NumPy, its choice of the best, its random factors, and a quadratic."""

import itertools
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.rules import Place, SyncPoint

from .simulation import Simulation, histories, make_rule, pso_rules, relaxed, seeds

NAN, INF = math.nan, math.inf


class NumpyPso:
    """Particle swarm optimisation as Kennedy and Eberhart, Clerc, and arXiv 2009.03816, write it."""

    def __init__(self, start: np.ndarray, num_particles: int, options: Any, total: int) -> None:
        self.velocity = np.zeros((num_particles, start.size))
        self.best_position = np.tile(start, (num_particles, 1))
        self.best_loss = [INF] * num_particles
        self.options, self.total, self.index = options, total, 0

    def coefficients(self) -> tuple[float, float, float]:
        o, t = self.options, (self.index + 1) / self.total
        names = ("inertia", "cognitive", "social")
        ends = [(getattr(o, name), getattr(o, f"final_{name}")) for name in names]
        w, c1, c2 = (a if b is None else (1 - t) * a + t * b for a, b in ends)
        if not o.constriction:
            return w, c1, c2
        chi = 2 / abs(2 - (c1 + c2) - math.sqrt((c1 + c2) ** 2 - 4 * (c1 + c2)))  # Clerc and Kennedy, equation 4
        return chi, chi * c1, chi * c2

    def sync(self, x: np.ndarray, fitness: list[float], alive: list[bool], r: np.ndarray) -> list[int]:
        """``r``: r1 and r2 of each particle and weight, shape (P, 2, n). Returns whom each follows."""
        num_particles, o = len(alive), self.options
        loss = [INF if math.isnan(f) or not living else f for f, living in zip(fitness, alive, strict=True)]
        for i, living in enumerate(alive):
            if not living:
                self.best_loss[i] = INF  # it forgets
            elif loss[i] < self.best_loss[i]:
                self.best_loss[i], self.best_position[i] = loss[i], x[i]
        ranking = self.best_loss if o.best == "all_time" else loss
        places = (self.best_position if o.best == "all_time" else x).copy()
        sources = []
        for i in range(num_particles):
            everybody = [j for j in range(num_particles) if alive[j]]
            near = [j for j in everybody if (i - j) % num_particles in (0, 1, num_particles - 1)]
            sources.append(min(near if o.topology == "ring" and near else everybody, key=lambda j: ranking[j]))
        w, c1, c2 = self.coefficients()
        limit = INF if o.velocity_clamp is None else o.velocity_clamp
        for i, source in enumerate(sources):
            if alive[i]:
                pull = c1 * r[i, 0] * (self.best_position[i] - x[i]) + c2 * r[i, 1] * (places[source] - x[i])
                self.velocity[i] = np.clip(w * self.velocity[i] + pull, -limit, limit)
                x[i] = x[i] + self.velocity[i]
            else:
                x[i], self.velocity[i], self.best_position[i] = places[source], 0.0, places[source]
        self.index += 1
        return sources


def random_factors(rule, index: int, num_particles: int, parameters: dict[str, int]) -> np.ndarray:
    """r1 and r2 as docs/concepts.md describes them, shape (P, 2, n)."""
    values = np.full((num_particles, 2, sum(parameters.values())), 0.5)
    for i in range(num_particles):
        if rule.options.randomness == "per_sync":
            values[i] = np.random.default_rng([rule.seed, index, i]).random(2)[:, None]
        elif rule.options.randomness == "per_tensor":
            keys = [[rule.seed, index, i, zlib.crc32(name.encode())] for name in parameters]
            pairs = [np.random.default_rng(key).random(2) for key in keys]
            values[i] = np.repeat(np.stack(pairs, axis=1), list(parameters.values()), axis=1)
    return values


@settings(relaxed, max_examples=200)
@given(pso_rules, histories, st.integers(0, 10), st.integers(0, 10), seeds)
def test_follows_the_equations(rule, rounds, numel, more, seed):
    rng = np.random.default_rng(seed)
    parameters = {"weight": numel, "bias": more}
    start, num_particles = rng.normal(size=numel + more), len(rounds[0][0])
    oracle = NumpyPso(start, num_particles, rule.options, total=8)
    swarm = Simulation(rule, torch.from_numpy(start.copy()), num_particles, total=8, parameters=parameters)
    for index, (fitness, alive) in enumerate(rounds):
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel + more)) if living else NAN
        expected = swarm.array()
        plan = swarm.sync(fitness, alive)
        factors = random_factors(rule, index, num_particles, parameters)
        assert oracle.sync(expected, fitness, alive, factors) == list(plan.sources)
        np.testing.assert_allclose(swarm.array(), expected, rtol=1e-9, atol=1e-9)
        for name, values in {"velocity": oracle.velocity, "best_position": oracle.best_position}.items():
            if name in swarm.state[0]:
                np.testing.assert_allclose(swarm.states(name), values, rtol=1e-9, atol=1e-9)


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
    assert make_rule("pso", best=best).plan(SyncPoint(0, fitness, alive), {}).sources == (source,) * 3


def test_window_forgets_and_all_time_remembers():
    """Particle 1 was best at first; at the second sync point particle 0 is, but not as good."""
    sources = {}
    for best in ("window", "all_time"):
        swarm = Simulation(make_rule("pso", best=best), torch.zeros(1), 2)
        sources[best] = [swarm.sync(fitness).sources[0] for fitness in [(5.0, 1.0), (2.0, 3.0)]]
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
    assert plan.sources == (1, 1)
    assert plan.memory["best_fitness"] == [INF, 2.0]


def test_in_a_ring_news_travels_one_neighbour_at_a_time():
    swarm = Simulation(make_rule("pso", topology="ring", best="all_time", social=2.0), torch.zeros(1), 6)
    swarm.x[0] += 1.0
    reached = []
    for fitness in [[0.0, *[9.0] * 5], *[[9.0] * 6] * 2]:
        plan = swarm.sync(fitness)
        reached.append([i for i, x in enumerate(swarm.x) if x.item() == 1.0])
        swarm.memory = plan.memory | {"best_fitness": [0.0 if x.item() == 1.0 else 9.0 for x in swarm.x]}
        for x, state in zip(swarm.x, swarm.state, strict=True):
            state["best_position"].copy_(x)
    assert reached == [[0, 1, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("dead", "sources"),
    [
        ((), (0, 0, 3, 3, 3, 0)),
        ((0,), (5, 1, 3, 3, 3, 4)),
        ((0, 1, 5), (3, 2, 3, 3, 3, 4)),  # 0 knows no living particle, and takes the best of all
        ((0, 1, 2, 3, 4), (5,) * 6),
    ],
)
def test_in_a_ring_each_knows_its_living_neighbours(dead, sources):
    alive = tuple(i not in dead for i in range(6))
    point = SyncPoint(0, (0.0, 9.0, 9.0, 3.0, 4.0, 5.0), alive)
    assert make_rule("pso", topology="ring").plan(point, {}).sources == sources


def test_constriction_is_that_of_the_textbook():
    """Clerc and Kennedy: with phi = 4.1, chi = 0.7298; then w = 0.7298 and c1 = c2 = 1.49618."""
    rule = make_rule("pso", constriction=True, cognitive=2.05, social=2.05)
    _, *factors = rule.plan(SyncPoint(0, (1.0,), (True,)), {}).factors[0]
    assert factors == pytest.approx([0.72984, 1.49618 / 2, 1.49618 / 2], abs=1e-5)  # r1 = r2 = 1/2


@relaxed
@given(pso_rules, histories, seeds)
def test_no_living_weight_moves_further_than_the_clamp(rule, rounds, seed):
    rng, limit = np.random.default_rng(seed), rule.options.velocity_clamp or INF
    swarm = Simulation(rule, torch.zeros(3, dtype=torch.float64), len(rounds[0][0]))
    for fitness, alive in rounds:
        for x in swarm.x:
            x += torch.from_numpy(rng.normal(size=3))
        before = swarm.array()
        swarm.sync(fitness, alive)
        assert np.abs(swarm.array() - before)[np.array(alive)].max() <= limit + 1e-9


def test_coefficients_end_at_their_final_values():
    rule = make_rule(
        "pso", inertia=0.9, final_inertia=0.4, cognitive=2.5, final_cognitive=0.5, social=0.5, final_social=2.5
    )
    plans = [rule.plan(SyncPoint(i, (1.0,), (True,), total=10), {}) for i in range(12)]
    assert plans[4].factors[0][1:] == pytest.approx((0.65, 0.75, 0.75))  # half-way; r1 = r2 = 1/2
    assert plans[9].factors[0][1:] == pytest.approx((0.4, 0.25, 1.25))
    assert plans[11].factors == plans[9].factors  # training that goes on longer than was said


# -- random factors -------------------------------------------------------------------------


def draws(seed=0, num_rounds=20, num_particles=4):
    """(r1, r2) of each sync point and particle, shape (rounds, P, 2)."""
    rule = make_rule("pso", seed=seed, cognitive=1.0, social=1.0, randomness="per_sync")
    alive = (True,) * num_particles
    plans = [rule.plan(SyncPoint(i, (0.0,) * num_particles, alive), {}) for i in range(num_rounds)]
    return np.array([[factors[2:] for factors in plan.factors] for plan in plans])


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


def test_each_tensor_has_factors_of_its_own():
    rule = make_rule("pso", randomness="per_tensor", best="all_time")
    swarm = Simulation(rule, torch.zeros(6), 3, parameters={"a": 2, "b": 3, "c": 1})
    swarm.x[1] += 1.0
    swarm.sync([2.0, 1.0, 3.0])
    for moved in swarm.array()[[0, 2]]:  # from 0 towards 1, by r2
        assert len({*moved[:2]}) == len({*moved[2:5]}) == 1
        assert len({*moved}) == 3
    assert not set(swarm.array()[0]) & set(swarm.array()[2])


@relaxed
@given(pso_rules, st.lists(st.integers(0, 12), max_size=6), seeds)
def test_factors_of_tensors_do_not_depend_on_shards(rule, edges, seed):
    """Shards and pieces end anywhere, also in the middle of a tensor; each part knows its tensor's name."""
    names = np.repeat(["a", "b", "c"], 4)
    rng, starts = np.random.default_rng(seed), sorted({0, 4, 8, *edges} - {12})
    plan = rule.plan(SyncPoint(3, (1.0, 2.0), (True, True), total=9), {})
    start, received = (torch.from_numpy(rng.normal(size=12)) for _ in range(2))
    results = []
    for cuts in ([0, 4, 8, 12], [*starts, 12]):
        x, state = start.clone(), rule.init_state(torch.zeros_like(start))
        for a, b in itertools.pairwise(cuts):
            part = {key: value[a:b] for key, value in state.items()}
            rule.update(x[a:b], received[a:b], part, plan, Place(1, str(names[a])))
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, set()),
        ({"inertia": 0.5}, {"velocity"}),
        ({"cognitive": 0.5}, {"best_position"}),
        ({"best": "all_time"}, {"best_position"}),
        ({"inertia": 0.5, "cognitive": 0.5}, {"velocity", "best_position"}),
        ({"final_inertia": 0.5}, {"velocity"}),
        ({"final_cognitive": 0.5}, {"best_position"}),
        ({"constriction": True, "cognitive": 2.05, "social": 2.05}, {"velocity", "best_position"}),
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
        {"topology": "ring"},
        {"constriction": True, "cognitive": 2.05, "social": 2.05},
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
