"""All searchers: the seed decides, the budget is kept, and what each of them proposes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.errors import ConfigError
from ds_pso.search.registry import SEARCHERS, make_options, make_searcher, parse_options

from .test_pso import ask, bumpy
from .test_space import space


def asked_by(name, *, seed=0, evaluations=60, cost=None, s=None, **options):
    s = s or space(4, 2, base=True)
    searcher = make_searcher(name, s, seed, make_options(name, options))
    return ask(searcher, cost or bumpy(np.full(s.shape, 0.3)), evaluations)


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_seed_decides(name):
    np.random.seed(1)
    random.seed(1)
    first = asked_by(name)
    np.random.seed(2)
    random.seed(2)
    again = asked_by(name)
    assert len(first) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    if name in ("pso", "model_swarms", "cma", "random"):
        assert not all(np.array_equal(a, b) for a, b in zip(first, asked_by(name, seed=1), strict=True))


@pytest.mark.parametrize("name", SEARCHERS)
def test_numpys_random_state_is_left_alone(name):
    np.random.seed(7)
    asked_by(name)
    after = np.random.random()
    np.random.seed(7)
    assert after == np.random.random()


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_candidate_does_not_change_after_it_was_asked_for(name):
    s = space(3, 2, base=True)
    searcher = make_searcher(name, s, 0, make_options(name, {}))
    kept = []
    for number in range(40):
        candidate = searcher.ask()
        if candidate is None:
            break
        kept.append((candidate.coefficients, candidate.coefficients.copy()))
        searcher.tell(float(number % 7))
    assert all(np.array_equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_search_in_which_nothing_has_a_score_goes_on(name):
    assert asked_by(name, cost=lambda c: math.inf)


@given(costs=st.lists(st.floats(-5, 5) | st.just(math.inf), min_size=12, max_size=12))
@settings(max_examples=200)
def test_a_greedy_soup_is_never_worse_than_the_best_single_expert(costs):
    told: list[tuple[float, np.ndarray]] = []

    def cost(c: np.ndarray) -> float:
        told.append((costs[len(told)], c))
        return told[-1][0]

    s = space(6, 2)
    asked_by("greedy_soup", cost=cost, s=s)
    assert len(told) == 6 + 5
    best, members = min((c, k) for k, (c, _) in enumerate(told[:6]))[0], []
    ranked = sorted(range(6), key=lambda k: (told[k][0], k))
    members = [ranked[0]]
    for expert, (found, c) in zip(ranked[1:], told[6:], strict=True):
        assert np.array_equal(c, s.soup([*members, expert]))  # the soup so far, and the next best expert
        if found <= best:
            best, members = found, [*members, expert]
    assert best <= min(c for c, _ in told[:6])


def test_random_weights_are_positive_and_sum_to_one():
    for c in asked_by("random", s=space(5, 3)):
        assert (c >= 0).all()
        np.testing.assert_allclose(c.sum(axis=0), 1)


def test_task_arithmetic_scales_what_all_experts_have_learnt():
    scales = asked_by("task_arithmetic", scales=5, largest=2.0)
    assert [c.tolist() for c in scales] == [[[scale] * 2] * 4 for scale in (0.4, 0.8, 1.2, 1.6, 2.0)]


@pytest.mark.parametrize("name", ["pso", "cma"])
def test_a_convex_cost_is_minimised(name):
    """With a base there is a coefficient for each number, so the optimum is in the space."""
    target = np.random.default_rng(0).normal(size=(4, 2))
    costs = []

    def cost(c: np.ndarray) -> float:
        costs.append(float(((c - target) ** 2).sum()))
        return costs[-1]

    asked_by(name, cost=cost, evaluations=1500)
    assert min(costs) < 1e-4 * costs[0]


def test_options_of_the_command_line():
    assert parse_options(["inertia=0.5", "random=term", "soups=false"]) == {
        "inertia": 0.5,
        "random": "term",
        "soups": False,
    }
    with pytest.raises(ConfigError, match=r"--option inertia: must be KEY=VALUE"):
        parse_options(["inertia"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("psi", {}, r"--searcher psi: must be one of pso, model_swarms, cma"),
        ("pso", {"inertai": 1.0}, r"--option inertai=1.0: Extra inputs are not permitted in the options of pso"),
        ("pso", {"inertia": -1.0}, r"--option inertia=-1.0: Input should be greater than or equal to 0"),
        ("pso", dict.fromkeys(("inertia", "cognitive", "social"), 0.0), r"--option: .* all 0, and one must be above"),
        ("best_single", {"scales": 3}, r"--option scales=3: Extra inputs"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_options(name, options)


def test_a_scale_needs_a_base():
    with pytest.raises(ConfigError, match="--searcher task_arithmetic: scales what experts have learnt"):
        asked_by("task_arithmetic", s=space(3, 1))
