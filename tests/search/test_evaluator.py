"""The budget, what is known already, scores that are no numbers, and the record from which a search goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.search.evaluator import Evaluator, score_references
from ds_pso.search.record import NAME, Record
from ds_pso.search.registry import SEARCHERS, make_options, make_searcher
from ds_pso.search.searcher import Candidate, Searcher
from ds_pso.utils import atomic_io

from .test_pso import bumpy
from .test_space import space

SPACE = space(4, 2, base=True)
COST = bumpy(np.full((4, 2), 0.3))
SETTINGS = {"searcher": "any", "seed": 0}


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "to_disk", lambda path: None)


class Scores:
    """A score function that counts its calls, and can be killed in one of them."""

    def __init__(self, function: Callable[[np.ndarray], float] = COST, die_at: int = 0) -> None:
        self.function, self.die_at, self.count = function, die_at, 0

    def __call__(self, c: np.ndarray) -> float:
        self.count += 1
        if self.count == self.die_at:
            raise KeyboardInterrupt
        return self.function(c)


def evaluator(folder: Path, scores: Scores, budget: int, *, resume: bool = False, **options: bool) -> Evaluator:
    return Evaluator(Record.open(folder, SETTINGS, resume=resume), scores, budget, **options)


def search(folder: Path, scores: Scores, budget: int, name: str = "pso", *, resume: bool = False) -> Evaluator:
    found = evaluator(folder, scores, budget, resume=resume)
    score_references(found, SPACE, noisy=False)
    found.run(make_searcher(name, SPACE, 3, make_options(name, {})))
    return found


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("budget", [7, 8, 50])
def test_the_budget_is_never_exceeded_and_all_that_is_counted_is_on_record(tmp_path, name, budget):
    scores = Scores()
    found = search(tmp_path, scores, budget, name)
    assert scores.count == found.count == len(json.loads((tmp_path / NAME).read_text())["evaluations"])
    assert found.count == budget if name in ("pso", "model_swarms", "cma", "random") else found.count <= budget


def test_references_and_repeated_candidates_cost_one_evaluation(tmp_path):
    scores = Scores()
    assert search(tmp_path, scores, 50, "best_single").count == scores.count == 4 + 1 + 1 + 1
    (tmp_path / NAME).unlink()
    assert search(tmp_path, Scores(), 50, "greedy_soup").count <= 4 + 1 + 1 + 1 + 3


@pytest.mark.parametrize("name", ["pso", "model_swarms", "cma", "random", "greedy_soup"])
@pytest.mark.parametrize("die_at", [1, 3, 9, 41])
def test_a_killed_search_goes_on_bit_for_bit(tmp_path, name, die_at):
    whole = search(tmp_path / "whole", Scores(), 60, name) if (tmp_path / "whole").mkdir() is None else None
    (tmp_path / "killed").mkdir()
    killed = Scores(die_at=die_at)
    try:
        search(tmp_path / "killed", killed, 60, name)
        finished = True
    except KeyboardInterrupt:
        finished = False
    resumed = Scores()
    again = search(tmp_path / "killed", resumed, 60, name, resume=die_at > 1)
    assert finished or killed.count - 1 + resumed.count == whole.count
    assert (tmp_path / "killed" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    assert np.array_equal(again.best.coefficients, whole.best.coefficients)
    assert again.improvements[-1][0] == whole.improvements[-1][0]


@pytest.mark.parametrize("name", ["pso", "cma"])
def test_more_evaluations_later_are_as_good_as_at_once(tmp_path, name):
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
    search(tmp_path / "once", Scores(), 80, name)
    search(tmp_path / "twice", Scores(), 33, name)
    more = Scores()
    search(tmp_path / "twice", more, 80, name, resume=True)
    assert more.count == 80 - 33
    assert (tmp_path / "twice" / NAME).read_bytes() == (tmp_path / "once" / NAME).read_bytes()


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_counts_as_worst(tmp_path, nothing, higher):
    def score(c: np.ndarray) -> float:
        return nothing if c[0, 0] == 1 else float(c[1, 0])

    found = evaluator(tmp_path, Scores(score), 50, higher_is_better=higher)
    score_references(found, SPACE, noisy=False)
    assert found.cost(Candidate(SPACE.one_hot(0), "")) == math.inf
    assert found.best_score == (1.0 if higher else 0.0)
    assert math.isnan(found.score_of(Candidate(SPACE.one_hot(0), "")))
    assert json.loads((tmp_path / NAME).read_text())["evaluations"][0]["score"] is None


def test_nothing_with_a_score_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--score: is not finite for any expert; check"):
        search(tmp_path, Scores(lambda c: math.nan), 50)
    assert not (tmp_path / NAME).exists()


def test_a_score_that_varies_is_seen_at_the_second_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    scores = Scores(lambda c: -1 - rng.random())
    with pytest.raises(
        ConfigError, match=r"expert e0 has the score -1.\d+ and then -1.\d+; let it use the same samples"
    ):
        search(tmp_path, scores, 50)
    assert scores.count == 2
    found = evaluator(tmp_path, scores, 50)  # nothing is left of the first attempt
    score_references(found, SPACE, noisy=True)
    assert found.count == 7


def test_a_searcher_that_has_converged_ends(tmp_path):
    def same():
        while True:
            yield Candidate(SPACE.uniform(), "the same")

    evaluator(tmp_path, scores := Scores(), 50).run(Searcher(same()))
    assert scores.count == 1


def test_other_candidates_than_those_on_record_are_an_error(tmp_path):
    search(tmp_path, Scores(), 20)
    with pytest.raises(CheckpointError, match=r"search.json: evaluation 8 was of other coefficients"):
        search(tmp_path, Scores(), 20, "random", resume=True)


def test_a_record_is_neither_overwritten_nor_mixed(tmp_path):
    with pytest.raises(ConfigError, match=r"--resume: .*search.json is not there; leave --resume out"):
        Record.open(tmp_path, SETTINGS, resume=True)
    search(tmp_path, Scores(), 20)
    with pytest.raises(ConfigError, match=r"is there from another search; go on with --resume"):
        Record.open(tmp_path, SETTINGS, resume=False)
    with pytest.raises(ConfigError, match=r"was searched with seed = 0, and this run has 1; resume with what it began"):
        Record.open(tmp_path, SETTINGS | {"seed": 1}, resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "settings": {}, "evaluations": [1]}'])
def test_a_damaged_record_is_an_error(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="begin anew"):
        Record.open(tmp_path, {}, resume=True)
