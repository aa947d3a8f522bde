"""Fragments of a delayed sync point: each is applied when it is due, and nothing is lost between them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool

from .jobs import Case, Net, Weights, assert_equal, one_after_the_other, swarm_of, train, working_weights
from .test_delay import RULES
from .test_truth import assert_true, weights_of_each


def numbers_of(layers: int, count: int) -> np.ndarray:
    """The fragment of each flat weight: layers in turn, and what lies outside of them fills up equal sizes in order."""
    assert layers % count == 0, "then all of them are whole"
    number = np.concatenate(
        [
            np.full(p.numel(), int(name.split(".")[1]) % count if "layers" in name else -1)
            for name, p in Net(layers=layers).named_parameters()
        ]
    )
    sizes = np.diff([len(number) * k // count for k in range(count + 1)])
    left = sizes - 30 * layers // count
    assert (left > 0).all()
    number[number < 0] = np.repeat(np.arange(count), left)
    assert (np.bincount(number) == sizes).all()
    return number


@pytest.mark.parametrize(
    ("stage", "particles", "delay", "fragments"),
    [
        pytest.param(0, 2, 3, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 3, 3, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, 3, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_every_rule_in_fragments(pool: Pool, stage: int, particles: int, delay: int, fragments: int) -> None:
    """Each element moves by the result, and keeps the steps since it was taken, when its fragment is due."""
    more = {"delay": delay, "fragments": fragments}
    shape = {"stage": stage, "particles": particles, "layers": 2 * fragments}
    cases = [replace(case, **shape, swarm=case.swarm | more) for case in RULES.values()]
    assert_each_true(pool, cases)


def assert_each_true(pool: Pool, cases: list[Case], world_size: int = 4) -> None:
    ranks = pool.run(weights_of_each, cases, world_size=world_size, timeout=120)
    for index, case in enumerate(cases):
        numbers = numbers_of(case.layers, case.swarm["fragments"])
        try:
            assert_true([weights[index] for weights in ranks], case, numbers)
        except AssertionError as error:
            raise AssertionError(f"{case}, {case.layers} layers: {error}") from error


def owned(case: Case) -> list[list[int]]:
    """Elements that this rank owns of each fragment of the model, at ZeRO 2 and 3."""
    found = []
    for _, swarm, _ in one_after_the_other(replace(case, stage=stage) for stage in (2, 3)):
        fragments = swarm.session.synchronizer.parts.fragments(case.swarm["fragments"])
        found.append([sum(r.stop - r.start for r in fragment) for fragment in fragments])
    return found


def test_each_rank_has_its_part_of_the_model_s_fragments(pool: Pool) -> None:
    """At ZeRO 2, where it owns a run of the model, it may have nothing of a fragment."""
    case = Case(interval=3, swarm={"delay": 3, "fragments": 3})
    ranks = pool.run(owned, case, world_size=4)
    assert ranks[:2] == ranks[2:], "peers own the same"
    for first, second in zip(*ranks[:2], strict=True):
        assert [sum(pair) for pair in zip(first, second, strict=True)] == [23, 23, 23]
    assert [0 in of_a_stage for of_a_stage in ranks[1]] == [True, False]


@pytest.mark.parametrize(
    ("stages", "size"), [((0, 2, 3), 2), *(pytest.param(s, 1, marks=pytest.mark.slow) for s in [(2,), (0, 1, 3)])]
)
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"delay": 3, "fragments": 3}, marks=pytest.mark.slow),
        {"delay": 1, "fragments": 3, "streaming": True},
    ],
    ids=str,
)
def test_the_result_does_not_depend_on_sharding(
    pool: Pool, stages: tuple[int, ...], size: int, more: dict[str, Any]
) -> None:
    """At any stage and number of ranks it is that of NumPy; without layers a rank has nothing of some fragments."""
    base = Case(sync_mode="diloco", steps=10, interval=3, seed=1, swarm=more)
    cases = [replace(base, stage=stage, layers=layers) for stage in stages for layers in (0, 6)]
    assert_each_true(pool, cases, world_size=2 * size)


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
