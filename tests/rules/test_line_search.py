"""Line search against its equations in NumPy, and when it keeps to the mean."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.rules import SyncPoint

from .simulation import Simulation, histories, line_search_rules, make_rule, relaxed, seeds


@settings(relaxed, max_examples=200)
@given(line_search_rules, histories, st.integers(1, 20), seeds)
def test_follows_the_equations(rule, rounds, numel, seed):
    """All drift towards a place some sync points away, so that now one length of the step is best, now another."""
    rng, o = np.random.default_rng(seed), rule.options
    drift = rng.normal(size=numel)
    target = 4 * drift
    num_particles = len(rounds[0][0])

    def score(x):
        return float(np.square(x - target).sum())

    swarm = Simulation(rule, torch.zeros(numel, dtype=torch.float64), num_particles, score=score)
    anchor = step = np.zeros(numel)
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(drift + rng.normal(size=numel)) if living else math.nan
        mean = swarm.array()[np.array(alive)].mean(axis=0)
        candidates = [mean - s * o.inertia * step for s in np.linspace(0, o.longest, num_particles)]
        scores = [score(candidate) for candidate in candidates]
        best = int(np.argmin(scores))
        if scores[best] >= (1 - o.margin) * scores[0]:
            best = 0
        step, anchor = anchor - candidates[best], candidates[best]
        swarm.sync(fitness, alive)
        np.testing.assert_allclose(swarm.array(), np.tile(anchor, (num_particles, 1)), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(swarm.states("momentum")[0], step, rtol=1e-9, atol=1e-9)


def test_far_from_the_target_the_longest_step_is_taken_again_and_again():
    """All go 1 per sync point; the consensus goes 1 and 0.5 x 2 times its last step."""
    swarm = Simulation(
        make_rule("line_search", inertia=0.5, longest=2.0), torch.zeros(1), 3, score=lambda x: float(1e3 - x[0])
    )
    places = []
    for _ in range(5):
        for x in swarm.x:
            x += 1.0
        swarm.sync([1.0] * 3)
        places.append(swarm.x[0].item())
    assert places == [1.0, 3.0, 6.0, 10.0, 15.0]


def proceed(scores, **options):
    """The inertia that is taken, given these scores."""
    rule = make_rule("line_search", inertia=1.0, longest=len(scores) - 1, **options)
    first = rule.plan(SyncPoint(1, (0.0,) * len(scores), (True,) * len(scores)), {})
    assert first.score
    last = rule.proceed(first, tuple(scores))
    assert not last.score
    assert len(set(last.factors)) == 1, "all must arrive at the same weights"
    return last.factors[0][0]


@pytest.mark.parametrize(
    ("scores", "margin", "taken"),
    [
        ([3.0, 1.0, 2.0], 0.0, 1),
        ([1.0, 1.0, 1.0], 0.0, 0),
        ([2.0, 1.0, 1.0], 0.0, 1),
        ([1.0, 0.95, 0.99], 0.1, 0),
        ([1.0, 0.85, 0.84], 0.1, 2),
        ([-1.0, -1.05, -1.2], 0.1, 2),  # a log-likelihood of densities
        ([-1.0, -1.05, -1.08], 0.1, 0),
        ([math.inf, 5.0, 4.0], 0.1, 2),
        ([1.0, math.inf, math.inf], 0.0, 0),
        ([math.inf, math.inf, math.inf], 0.0, 0),
    ],
)
def test_a_candidate_must_be_better_by_the_margin(scores, margin, taken):
    assert proceed(scores, margin=margin) == taken


def test_there_is_nothing_to_search_at_the_first_sync_point():
    plan = make_rule("line_search").plan(SyncPoint(0, (0.0, 0.0), (True, True)), {})
    assert not plan.score
    assert {factor for (factor,) in plan.factors} == {0.0}


def test_a_candidate_that_is_not_finite_reaches_nobody():
    """Weights that explode along the last step: only the mean itself can be evaluated."""
    swarm = Simulation(
        make_rule("line_search"), torch.zeros(2), 3, score=lambda x: math.nan if np.abs(x).max() > 2 else float(x.sum())
    )
    for _ in range(3):
        for x in swarm.x:
            x += 0.9
        swarm.sync([1.0] * 3)
        assert np.isfinite(swarm.array()).all()
    np.testing.assert_allclose(swarm.array(), 2.7, rtol=1e-6)
