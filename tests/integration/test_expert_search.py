"""Particles that become experts, and the search among their combinations, against NumPy at every stage and sharding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

from ds_pso.errors import ConfigError, SwarmError
from ds_pso.search.evaluator import Evaluator, score_references
from ds_pso.search.record import Record
from ds_pso.search.registry import make_options, make_searcher
from ds_pso.search.space import Space, find_blocks

from .jobs import Case, Weights, assert_close, assert_equal, swarm_of, train, working_weights

CASE = Case(steps=4, layers=2, lr=0.1, swarm={"sync_interval": "never"})
EVALUATIONS = 40
# What the searches look for: of each parameter, how much of the first expert; the rest is of the second.
PARTS = {"first": 0.2, "layers.0": 1.3, "layers.1": 0.6, "norm": 0.4, "last": -0.3, "scale": 0.5}


def target(experts: list[Weights]) -> Weights:
    part = {name: next(p for begin, p in PARTS.items() if name.startswith(begin)) for name in experts[0]}
    return {name: part[name] * experts[0][name] + (1 - part[name]) * experts[1][name] for name in experts[0]}


def distance(weights: Weights, wanted: Weights) -> float:
    return sum(float(np.square(weights[name] - wanted[name], dtype=np.float64).sum()) for name in wanted)


def score_of(swarm: Any, engine: Any, wanted: Weights) -> Callable[[], float]:
    """On rank r, r + 1 times how far the model is: a mean over all ranks."""
    return lambda: (swarm.world.layout.rank + 1) * distance(working_weights(engine), wanted)


def experts_of(swarm: Any, engine: Any) -> list[Weights]:
    mine = {name: value.tolist() for name, value in working_weights(engine).items()}
    found = swarm.world.coordinator.gather("weights", mine)[:: swarm.world.layout.particle_size]
    return [{name: np.array(value, np.float32) for name, value in weights.items()} for weights in found]


def searched(case: Case, folder: Path, settings: dict[str, Any]) -> tuple[list[Weights], Any, Weights]:
    """The experts, what was found, and the weights that this particle has in the end."""
    with swarm_of(case, run_dir=folder) as (swarm, engine):
        train(case, engine)
        experts = experts_of(swarm, engine)
        score = score_of(swarm, engine, target(experts))
        result = swarm.search(score, test=score, evaluations=EVALUATIONS, **settings)
        return experts, result, working_weights(engine)


def in_numpy(experts: list[Weights], num_ranks: int, **settings: Any) -> tuple[list[tuple[str, float]], np.ndarray]:
    """(who proposed, score) of each evaluation, and the best coefficients."""
    wanted, factor = target(experts), sum(range(1, num_ranks + 1)) / num_ranks
    shapes = {name: value.shape for name, value in experts[0].items()}
    space = Space(("particle_0", "particle_1"), find_blocks(shapes, settings.get("blocks", "layers")))

    def score(c: np.ndarray) -> float:
        weights = {}
        for column, names in zip(space.weights(c).T, space.blocks.values(), strict=True):
            for name in names:
                weights[name] = sum(
                    w * expert[name].astype(np.float64) for w, expert in zip(column, experts, strict=True)
                )
        return factor * distance(weights, wanted)

    record = Record(Path("none"), {}, on_disk=False)
    evaluator = Evaluator(record, score, EVALUATIONS)
    name = settings.get("searcher", "pso")
    score_references(evaluator, space, noisy=False)
    evaluator.run(make_searcher(name, space, settings.get("seed", 0), make_options(name, {})))
    return [(item.by, item.score) for item in record.evaluations], evaluator.best.coefficients


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
@pytest.mark.parametrize("settings", slow_but([{}], [{}, {"searcher": "greedy_soup", "blocks": "one"}]), ids=str)
def test_it_scores_and_finds_what_a_search_in_one_process_does(
    pool: Pool, tmp_path: Path, stage: int, settings: dict[str, Any]
) -> None:
    found = pool.run(searched, replace(CASE, stage=stage), tmp_path, settings)
    experts, result, weights = found[0]
    evaluations, coefficients = in_numpy(experts, len(found), **settings)
    written = json.loads((tmp_path / "search.json").read_text())
    assert [item["by"] for item in written["evaluations"]] == [by for by, _ in evaluations]
    scores = [item["score"] for item in written["evaluations"]]
    np.testing.assert_allclose(scores, [score for _, score in evaluations], rtol=1e-3, atol=1e-6)
    table = [list(row.values()) for row in result.coefficients.values()]
    np.testing.assert_allclose(table, coefficients, rtol=1e-12)
    assert result.winner.score == result.winner.test == min(scores)
    assert result.winner.score <= result.best_single.score
    if not settings:
        assert result.winner.score < 0.5 * min(result.best_single.score, result.uniform_soup.score)
    for _, other, own in found:
        assert other.winner == result.winner
        assert_equal(own, weights)
    assert result.winner.score == pytest.approx(2.5 * distance(weights, target(experts)), rel=1e-3)


def test_the_ranks_of_a_particle_do_not_matter(pool: Pool, tmp_path: Path) -> None:
    (_, one, alone), *_ = pool.run(searched, replace(CASE, stage=0), tmp_path / "1", {}, world_size=2)
    (_, two, shared), *_ = pool.run(searched, replace(CASE, stage=3), tmp_path / "2", {}, world_size=4)
    assert one.winner.by == two.winner.by
    for name, row in one.coefficients.items():
        assert row == pytest.approx(two.coefficients[name], rel=1e-12)
    assert_close(alone, shared)


def saved_and_searched(case: Case, folder: Path, evaluations: int) -> Weights:
    with swarm_of(case, run_dir=folder / "run") as (swarm, engine):
        train(case, engine)
        swarm.save(folder / "saved")
        swarm.search(score_of(swarm, engine, target(experts_of(swarm, engine))), evaluations=evaluations)
        return working_weights(engine)


def resumed(case: Case, folder: Path) -> Weights:
    with swarm_of(case, run_dir=folder / "run") as (swarm, engine):
        swarm.load(folder / "saved")
        score = score_of(swarm, engine, target(experts_of(swarm, engine)))
        swarm.search(score, evaluations=EVALUATIONS, resume=True)
        return working_weights(engine)


def test_it_goes_on_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    pool.run(saved_and_searched, CASE, tmp_path / "cut", 11)
    whole = pool.run(saved_and_searched, CASE, tmp_path / "whole", EVALUATIONS)
    for was, now in zip(whole, pool.run(resumed, CASE, tmp_path / "cut"), strict=True):
        assert_equal(now, was)
    one, other = (json.loads((tmp_path / name / "run/search.json").read_text()) for name in ("cut", "whole"))
    assert one == other


def refusals(case: Case, folder: Path) -> list[str]:
    said = []
    with swarm_of(case, run_dir=folder) as (swarm, engine):
        train(case, engine)
        expert = working_weights(engine)
        rank, calls = swarm.world.layout.rank, iter(range(100))

        def failing() -> float:
            if rank == 2:
                raise ValueError("no samples")
            return 1.0

        scores: list[Callable[[], float]] = [lambda: float(next(calls)), lambda: float("nan"), failing]
        for score in scores:
            with pytest.raises((ConfigError, SwarmError)) as caught:
                swarm.search(score, evaluations=EVALUATIONS)
            assert caught.value.agreed
            said.append(str(caught.value))
            assert_equal(working_weights(engine), expert)  # or the next search would find equal experts
            assert engine.module.training
        for wrong in ({"evaluations": 3}, {"searcher": "ants"}, {"searcher": "task_arithmetic"}, {"resume": True}):
            with pytest.raises(ConfigError) as refused:
                swarm.search(lambda: 1.0, **wrong)
            said.append(str(refused.value))
        assert not (folder / "search.json").exists(), "a search that never began has left a record"
        if swarm.particle == 1:
            swarm.session.synchronizer.parts.shards.tensors[0][0] = float("inf")
        with pytest.raises(SwarmError, match="the weights of particle 1 are not finite"):
            swarm.search(lambda: 1.0)
        swarm.session.is_merged = True
    return said


def test_what_cannot_be_searched_is_said_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    first, *others = pool.run(refusals, CASE, tmp_path)
    assert others == [first] * 3
    unsure, infinite, failed, few, ants, base, resume = first
    assert "expert particle_0 has the score 0 and then 1; let it use the same samples each time" in unsure
    assert "is not finite for any expert" in infinite
    assert "no samples" in failed
    assert few.startswith("swarm.search evaluations = 3: must be at least 4")
    assert ants.startswith("--searcher ants: must be one of")
    assert "task_arithmetic" in base
    assert "is not there" in resume


def alone(case: Case) -> str:
    with swarm_of(case) as (swarm, _), pytest.raises(ConfigError) as refused:
        swarm.search(lambda: 1.0)
    return str(refused.value)


def test_one_particle_has_nothing_to_combine(pool: Pool) -> None:
    assert pool.run(alone, Case(particles=1), world_size=2)[0].startswith("swarm.search: there is one particle")
