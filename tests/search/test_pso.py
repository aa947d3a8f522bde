"""The swarm against loops in NumPy that draw the same random numbers, and against Model Swarms in weight space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ds_pso.search.pso import PsoOptions, model_swarms_options, pso
from ds_pso.search.searcher import Searcher

from .test_space import space

Cost = Callable[[np.ndarray], float]


def ask(searcher: Searcher, cost: Cost, evaluations: int) -> list[np.ndarray]:
    asked = []
    for _ in range(evaluations):
        candidate = searcher.ask()
        if candidate is None:
            break
        asked.append(candidate.coefficients)
        searcher.tell(cost(candidate.coefficients))
    return asked


def bumpy(target: np.ndarray) -> Cost:
    """Has many local minima, and no value in a part of the space."""

    def cost(c: np.ndarray) -> float:
        z = c - target
        return float("inf") if c[0, 0] > 1.3 else float((z**2).sum() + 0.3 * np.cos(5 * z).sum())

    return cost


def by_the_equations(shape: tuple[int, int], o: PsoOptions, cost: Cost, iterations: int, seed: int) -> list[np.ndarray]:
    """Positions in the order in which they are scored after the starts, number by number."""
    rng = np.random.default_rng(seed)
    K, B = shape
    x = [np.eye(K)[k][:, None] * np.ones((1, B)) for k in range(K)]
    x.sort(key=cost)  # stable, as ties are by number
    while len(x) < o.particles:
        a, b = rng.choice(K, size=2, replace=False)
        t = rng.random()
        x.append(np.array([[t * (k == a) + (1 - t) * (k == b)] * B for k in range(K)]))
    v = [np.zeros(shape) for _ in x]
    if o.first_velocity == "other":
        v = [x[(i + rng.integers(1, len(x))) % len(x)] - x[i] for i in range(len(x))]
    own, own_cost, stale = [p.copy() for p in x], [cost(p) for p in x], [0] * len(x)
    everything = list(zip(own_cost, [p.copy() for p in x], strict=True))
    step, positions = o.step, []
    for _ in range(iterations):
        best = own[min(range(len(x)), key=lambda i: own_cost[i])].copy()
        worst_cost = max(c for c, _ in everything)
        worst = next(p for c, p in everything if c == worst_cost)
        for i in range(len(x)):
            if o.restart_after and stale[i] >= o.restart_after:
                x[i], v[i], stale[i] = own[i].copy(), np.zeros(shape), 0
            r = rng.random((4, K, B) if o.random == "number" else (4, 1, 1)) * np.ones((4, K, B))
            new = np.zeros(shape)
            for k in range(K):
                for b in range(B):
                    rv = r[0, k, b] if o.random_inertia else 1.0
                    w, p, g, a = rv * o.inertia, r[1, k, b] * o.cognitive, r[2, k, b] * o.social, r[3, k, b] * o.repel
                    here = x[i][k, b]
                    new[k, b] = w * v[i][k, b] + p * (own[i][k, b] - here) + g * (best[k, b] - here)
                    new[k, b] += a * (here - worst[k, b])
                    if o.normalize:
                        new[k, b] /= w + p + g + a
            v[i] = new
            x[i] = x[i] + step * v[i]
        for i in range(len(x)):
            positions.append(x[i].copy())
            now = cost(x[i])
            everything.append((now, x[i].copy()))
            stale[i] += 1
            if now < own_cost[i]:
                own[i], own_cost[i], stale[i] = x[i].copy(), now, 0
        step = max(step * o.step_decay, o.step_min) if step > o.step_min else step
    return positions


@pytest.mark.parametrize(
    "options",
    [
        PsoOptions(soups=False),
        PsoOptions(soups=False, inertia=0.5, cognitive=0.4, social=2.0, random="term", random_inertia=True),
        PsoOptions(soups=False, repel=0.2, step=0.9, step_decay=0.8, step_min=0.4, particles=7, first_velocity="other"),
        PsoOptions(soups=False, repel=0.1, normalize=True, restart_after=2),
        model_swarms_options(particles=8, restart_after=2, patience=0),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_follows_the_equations(options, seed):
    shape, iterations = (4, 3), 12
    cost = bumpy(np.random.default_rng(5).normal(size=shape))
    starts = max(shape[0], options.particles)
    searcher = Searcher(pso(space(*shape), np.random.default_rng(seed), options))
    asked = ask(searcher, cost, starts + iterations * starts)
    np.testing.assert_allclose(asked[starts:], by_the_equations(shape, options, cost, iterations, seed), atol=1e-12)


def test_model_swarms_in_the_space_of_weights_is_a_swarm_of_coefficients():
    """The published algorithm, whose positions are the weights of whole experts, moves to the models composed here."""
    experts, numbers, evaluations = 5, 40, 85
    rng = np.random.default_rng(3)
    weights, target = rng.normal(size=(experts, numbers)), rng.normal(size=numbers)
    s, o = space(experts, 1), model_swarms_options(particles=5, patience=0, restart_after=0)

    def model(c: np.ndarray) -> np.ndarray:
        return s.weights(c)[:, 0] @ weights

    def loss(x: np.ndarray) -> float:
        return float(((x - target) ** 2).sum())

    asked = ask(Searcher(pso(s, np.random.default_rng(9), o)), lambda c: loss(model(c)), evaluations)

    rng = np.random.default_rng(9)
    x = np.array(sorted(weights, key=loss))
    v = np.array([x[(i + rng.integers(1, experts)) % experts] - x[i] for i in range(experts)])
    own, step, seen = x.copy(), o.step, list(x.copy())
    for _ in range(evaluations // experts - 1):
        best, worst = min(own, key=loss).copy(), max(seen, key=loss).copy()
        for i in range(experts):
            r = rng.random(4) * (o.inertia, o.cognitive, o.social, o.repel)
            v[i] = (r[0] * v[i] + r[1] * (own[i] - x[i]) + r[2] * (best - x[i]) - r[3] * (worst - x[i])) / r.sum()
            x[i] = x[i] + step * v[i]
            own[i] = min(own[i], x[i].copy(), key=loss)
            seen.append(x[i].copy())
        step = max(step * o.step_decay, o.step_min)
    np.testing.assert_allclose([model(c) for c in asked[experts:]], seen[experts:], atol=1e-9)


def test_a_swarm_without_patience_left_ends():
    searcher = Searcher(pso(space(3, 1), np.random.default_rng(0), PsoOptions(soups=False, patience=4)))
    assert len(ask(searcher, lambda c: 0.0, 1000)) == 3 + 4 * 3


def test_soups_and_base_are_particles_too():
    names = []
    searcher = Searcher(pso(space(3, 2, base=True), np.random.default_rng(0), PsoOptions()))
    while len(names) < 40:
        names.append(searcher.ask().by)
        searcher.tell(float(len(names)))
    moving = ["expert e0", "expert e1", "expert e2", "greedy soup", "uniform soup", "base"]
    assert names[-6:] in [[f"particle from {name}" for name in moving[k:] + moving[:k]] for k in range(6)]
