"""Fragments of a delayed sync point: each is applied when it is due, and nothing is lost between them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool

from .jobs import Case, Net, Weights, assert_equal, master_pieces, one_after_the_other, swarm_of, train, working_weights
from .test_delay import RULES
from .test_truth import assert_true, weights_of_each

Pieces = list[tuple[str, int, int]]  # of the masters: parameter, offset in it, number of elements


def weights_and_pieces(cases: list[Case]) -> tuple[list[Weights], list[Pieces]]:
    weights, pieces = [], []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine)
        weights.append(working_weights(engine))
        pieces.append([(name, start, values.size) for name, start, values in master_pieces(swarm)])
    return weights, pieces


def numbers_of(particle: list[Pieces], count: int) -> np.ndarray:
    """The fragment of each flat weight: what a rank owns, in the order of the parameters, in equal parts."""
    begins, total = {}, 0
    for name, parameter in Net().named_parameters():
        begins[name], total = total, total + parameter.numel()
    number = np.full(total, -1)
    for rank in particle:
        mine = np.sort(np.concatenate([np.arange(n) + begins[name] + start for name, start, n in rank]))
        bounds = [len(mine) * k // count for k in range(count + 1)]
        for k in range(count):
            number[mine[bounds[k] : bounds[k + 1]]] = k
    assert (number >= 0).all()
    return number


@pytest.mark.parametrize(
    ("stage", "particles", "delay", "fragments"),
    [
        pytest.param(0, 2, 3, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 3, 3, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, 3, 2, marks=pytest.mark.slow),
        (2, 2, 3, 3),
    ],
)
def test_every_rule_in_fragments(pool: Pool, stage: int, particles: int, delay: int, fragments: int) -> None:
    """Each element moves by the result, and keeps the steps since it was taken, when its fragment is due."""
    more = {"delay": delay, "fragments": fragments}
    cases = [replace(case, stage=stage, particles=particles, swarm=case.swarm | more) for case in RULES.values()]
    assert_each_true(pool, cases, particles, fragments)


def assert_each_true(pool: Pool, cases: list[Case], particles: int, fragments: int) -> None:
    ranks = pool.run(weights_and_pieces, cases, world_size=4, timeout=120)
    for index, case in enumerate(cases):
        numbers = numbers_of([pieces[index] for _, pieces in ranks[: 4 // particles]], fragments)
        try:
            assert_true([weights[index] for weights, _ in ranks], case, numbers)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_fragments_matter_and_one_is_the_whole(pool: Pool) -> None:
    base = Case(sync_mode="diloco", steps=10, interval=4, seed=1)
    cases = [replace(base, swarm={"delay": 4, **more}) for more in ({}, {"fragments": 1}, {"fragments": 4})]
    for whole, one, four in pool.run(weights_of_each, cases, world_size=4):
        assert_equal(one, whole)
        assert any((four[name] != whole[name]).any() for name in whole)


def test_delayed_is_all_of_it_by_name(pool: Pool) -> None:
    base = Case(steps=10, interval=4, seed=1)
    keys = {"delay": 3, "schedule": {"type": "fixed"}}
    by_name = replace(base, sync_mode="delayed", swarm=keys)
    by_keys = replace(base, swarm=keys | {"fragments": 3})
    for mine, expected in pool.run(weights_of_each, [by_name, by_keys], world_size=4):
        assert_equal(mine, expected)


def records_of(case: Case) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: found.append(record.to_json() | {"step": engine.global_steps}))
        train(case, engine)
    return found


def test_the_record_says_when_each_came_and_was_applied(pool: Pool) -> None:
    case = Case(steps=9, interval=4, swarm={"delay": 3, "fragments": 2})
    for records in pool.run(records_of, case, world_size=4):
        assert [record["step"] for record in records] == [7]
        (record,) = records
        assert record["fragments_staleness"] == [math.ceil(1.5), 3]
        assert record["staleness"] == 3
        first, second = record["fragments_s"]
        assert 0 < first <= second


def with_a_dead_particle(case: Case) -> list[Any]:
    """Whether each particle's weights are finite after each step, and its losses."""
    found: list[Any] = []
    with swarm_of(case) as (swarm, engine):
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            if step == 1 and swarm.particle == 1:
                for x in swarm.session.synchronizer.parts.shards.tensors:
                    x.fill_(float("nan"))
                swarm.session.synchronizer.parts.shards.publish()
            weights = working_weights(engine)
            found.append(all(bool(np.isfinite(value).all()) for value in weights.values()))
        return [found, swarm.totals.count, weights]


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_dead_particle_takes_all_of_it_at_once(pool: Pool, stage: int) -> None:
    """It would carry its NaN into what has come already."""
    case = Case(stage=stage, steps=9, interval=3, swarm={"delay": 3, "fragments": 3, "total_steps": 9})
    ranks = pool.run(with_a_dead_particle, case, world_size=4)
    for alive, count, _ in ranks[:2]:
        assert (alive, count) == ([True] * 9, 3)
    for alive, count, _ in ranks[2:]:
        assert (alive, count) == ([True, False, False, *[True] * 6], 3)
    for rank in ranks[1:]:
        assert_equal(rank[2], ranks[0][2])


def interrupted(case: Case, folder: Path, stop: int | None) -> Weights:
    with swarm_of(case) as (swarm, engine):
        if stop is None:
            swarm.load(folder)
        while engine.global_steps < case.steps:
            step = engine.global_steps
            train(case, engine, range(step, step + 1))
            if engine.global_steps == stop:
                swarm.save(folder)
        return working_weights(engine)


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.slow) for stop in (4, 5)), 6])
def test_resuming_between_fragments_is_exact(pool: Pool, tmp_path: Path, stop: int) -> None:
    """Begun at step 4; due at 6 and 7. Also with another number of fragments in the config from then on."""
    case = Case(sync_mode="easgd", steps=10, interval=4, seed=1, swarm={"delay": 3, "fragments": 2, "wire": "int8"})
    truth = pool.run(interrupted, case, tmp_path, stop, world_size=4)
    for later in (2, 3):
        again = replace(case, seed=9, swarm=case.swarm | {"fragments": later}, steps=8)
        short = pool.run(interrupted, replace(case, steps=8), tmp_path / "short", stop, world_size=4)
        resumed = pool.run(interrupted, again, tmp_path, None, world_size=4)
        for mine, expected in zip(resumed, short, strict=True):
            assert_equal(mine, expected)
    for mine, expected in zip(
        pool.run(interrupted, replace(case, seed=9), tmp_path, None, world_size=4), truth, strict=True
    ):
        assert_equal(mine, expected)
