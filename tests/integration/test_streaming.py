"""Streaming: each fragment syncs by itself, in its turn, and is a swarm of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

from .jobs import Case, Weights, assert_equal, swarm_of, train, working_weights
from .test_delay import RULES
from .test_fragments import assert_each_true, records_of, with_a_dead_particle
from .test_wire import flat

TWO = {"streaming": True, "fragments": 2}


@pytest.mark.parametrize(
    ("stage", "particles", "interval", "delay", "fragments"),
    [
        pytest.param(0, 2, 4, 2, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 6, 1, 3, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, 1, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, 4, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 6, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_every_rule(pool: Pool, stage: int, particles: int, interval: int, delay: int, fragments: int) -> None:
    """Each fragment moves as if it were the whole model, met every interval, and began in its turn."""
    more = {"streaming": True, "delay": delay, "fragments": fragments}
    shape: dict[str, Any] = {"stage": stage, "particles": particles, "interval": interval, "layers": 2 * fragments}
    cases = [
        replace(case, **shape, swarm=case.swarm | more)
        for case in RULES.values()
        if "optimizer_state" not in case.swarm
    ]
    assert_each_true(pool, cases)


def test_a_particle_may_keep_a_part_of_its_own_way(pool: Pool) -> None:
    """x <- x + (1 - alpha) (result - x when it began), against NumPy; the last sync point waits, and is as ever."""
    more = {"fragments": 2, "mixing": 0.25, "total_steps": 10}
    case = Case(sync_mode="diloco", steps=10, interval=4, layers=4)
    in_pieces = replace(case, swarm={**more, "delay": 2})
    assert_each_true(pool, [in_pieces, replace(case, swarm={**more, "delay": 1, "streaming": True})])


def test_the_record_says_whose_turn_it_was(pool: Pool) -> None:
    case = Case(steps=13, interval=6, swarm={"streaming": True, "fragments": 3, "delay": 1, "total_steps": 13})
    whole = replace(case, swarm={"total_steps": 13})
    for records, (first, *_) in zip(
        pool.run(records_of, case, world_size=4), pool.run(records_of, whole, world_size=4), strict=True
    ):
        assert [record["step"] for record in records] == [3, 5, 7, 9, 11, 12]  # the last one waits, and is of all
        assert [record.get("fragment") for record in records] == [0, 1, 2, 0, 1, None]
        assert [record["next_interval"] for record in records] == [2] * 6
        in_turns = sum(record["bytes_received"] for record in records[:3])
        # Of each sync point there are, beside the shard: the losses, and how far the particles were apart. Only the
        # whole shard is sent with its padding.
        assert 0 <= first["bytes_received"] + 2 * (12 + 2) * 8 - in_turns <= 4 * 4


def common_and_weights(case: Case) -> list[tuple[np.ndarray, Weights]]:
    """What the wire takes for known to all, after each sync point."""
    found = []
    with swarm_of(case) as (swarm, engine):
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            swarm.world.background.settle()
            found.append((flat(swarm.session.synchronizer.parts.updater.differences.common), working_weights(engine)))
    return found


@pytest.mark.parametrize("sync_mode", slow_but(["local_sgd"], ["local_sgd", "easgd", "pso"]))
def test_with_few_digits_all_know_the_same(pool: Pool, sync_mode: str) -> None:
    case = Case(sync_mode=sync_mode, steps=8, interval=4, swarm={**TWO, "delay": 2, "wire": "int4", "total_steps": 8})
    ranks = pool.run(common_and_weights, case, world_size=4)
    for rank, peer in ((0, 2), (1, 3)):
        for (mine, _), (other, _) in zip(ranks[rank], ranks[peer], strict=True):
            np.testing.assert_array_equal(mine, other)
    changed = np.concatenate([rank[0][0] != rank[2][0] for rank in ranks[:2]])
    assert 0 < np.mean(changed) < 0.6  # one of the two fragments
    if sync_mode == "local_sgd":
        for rank in ranks[1:]:
            assert_equal(rank[-1][1], ranks[0][-1][1])


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_dead_particle_takes_the_whole_model(pool: Pool, stage: int) -> None:
    """After the sync point of step 2 has begun: that of step 4 is abandoned, and at step 5 all sync for all of it."""
    case = Case(stage=stage, steps=8, interval=4, swarm={**TWO, "delay": 1, "total_steps": 8})
    ranks = pool.run(with_a_dead_particle, case, world_size=4)
    for alive, count, _ in ranks[:2]:
        assert (alive, count) == ([True] * 8, 5)
    for alive, count, _ in ranks[2:]:
        assert (alive, count) == ([True, False, False, False, *[True] * 4], 5)
    for rank in ranks[1:]:
        assert_equal(rank[2], ranks[0][2])


def spoilt(
    case: Case,
    *,
    nan_loss_at: int = -1,
    nan_weights_at: int = -1,
    sync_at: int = -1,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> tuple[list[Any], list[np.ndarray], Weights]:
    """What each sync point was like; what the wire takes for known to all; the weights.

    Particle 1 sees a NaN instead of a loss in a step, with gradients all the same, or has NaN for weights after it;
    ``sync_at``: the script asks for a sync point.
    """
    records: list[Any] = []
    with swarm_of(case) as (swarm, engine):
        if load_from is not None:
            swarm.load(load_from)
        names = ("fragment", "abandoned", "alive")

        def note(record: Any) -> None:
            r = record.to_json()
            records.append((engine.global_steps, *(r.get(name) for name in names), r))

        swarm.on_sync(note)

        def spoil(index: int, loss: Any) -> Any:
            return loss + math.nan if (index + 1, swarm.particle) == (nan_loss_at, 1) else loss

        for step in range(engine.global_steps, case.steps):
            train(case, engine, range(step, step + 1), spoil)
            if (step + 1, swarm.particle) == (nan_weights_at, 1):
                for x in swarm.session.synchronizer.parts.shards.tensors:
                    x.fill_(math.nan)
                swarm.session.synchronizer.parts.shards.publish()
            if step + 1 == sync_at:
                swarm.sync()
        if save_to is not None:
            swarm.save(save_to)
        swarm.world.background.settle()
        differences = swarm.session.synchronizer.parts.updater.differences
        return records, [flat(differences.common)] if differences else [], working_weights(engine)


def kinds(rank: Any) -> list[Any]:
    """(step, fragment, abandoned, alive) of each sync point."""
    return [(*record[:3], tuple(record[3])) for record in rank[0]]


WELL, DEAD = (True, True), (True, False)


@pytest.mark.parametrize(
    ("sync_mode", "wire"), slow_but([("diloco", "int4")], [("diloco", "fp32"), ("diloco", "int4"), ("pso", "int8")])
)
def test_if_the_next_turn_comes_all_meet_and_nobody_twice(pool: Pool, sync_mode: str, wire: str) -> None:
    """With a delay of n / F, the step at which all sync in place of an abandoned turn is that of the next turn."""
    case = Case(sync_mode=sync_mode, steps=9, interval=4, swarm={**TWO, "delay": 2, "wire": wire})
    ranks = pool.run(spoilt_weights, case, 3, world_size=4)
    for rank in ranks:
        assert kinds(rank) == [
            (4, 0, False, WELL),
            (6, 1, True, DEAD),
            (6, None, None, DEAD),
        ]
        assert all(np.isfinite(value).all() for value in rank[2].values())
    for rank, peer in ((0, 2), (1, 3)):
        for mine, other in zip(ranks[rank][1], ranks[peer][1], strict=True):
            np.testing.assert_array_equal(mine, other)


def spoilt_weights(case: Case, step: int) -> Any:
    return spoilt(case, nan_weights_at=step)


def spoilt_loss(case: Case, step: int) -> Any:
    return spoilt(case, nan_loss_at=step)


def asked_for(case: Case, step: int) -> Any:
    return spoilt(case, nan_weights_at=step - 1, sync_at=step)


def save(case: Case, step: int, folder: Path) -> Any:
    return spoilt(case, nan_weights_at=step, save_to=folder)


def load(case: Case, folder: Path) -> Any:
    return spoilt(case, load_from=folder)


def test_a_loss_that_is_not_finite_is_not_forgotten(pool: Pool) -> None:
    """The particle is replaced also if its weights are finite; and all steps since the last sync point count."""
    case = Case(steps=6, interval=4, swarm={**TWO, "delay": 1})
    for rank in pool.run(spoilt_loss, case, 3, world_size=4):
        assert kinds(rank) == [(3, 0, False, WELL), (5, 1, True, DEAD), (5, None, None, DEAD)]
        turn, whole = rank[0][1][4], rank[0][2][4]
        assert math.isfinite(turn["losses"][0])
        assert turn["losses"][0] != whole["losses"][0], "of two steps, and then of three"


def test_who_asks_for_a_sync_point_over_an_abandoned_turn_gets_one(pool: Pool) -> None:
    case = Case(steps=4, interval=4, swarm={**TWO, "delay": 2})
    for rank in pool.run(asked_for, case, 4, world_size=4):
        assert kinds(rank) == [(4, 0, False, WELL), (4, 1, True, DEAD), (4, None, None, DEAD)]


def test_resuming_before_all_meet_is_exact(pool: Pool, tmp_path: Path) -> None:
    case = Case(sync_mode="easgd", steps=9, interval=4, seed=1, swarm={**TWO, "delay": 2, "wire": "int8"})
    straight = pool.run(spoilt_weights, case, 3, world_size=4)
    begun = pool.run(save, replace(case, steps=5), 3, tmp_path, world_size=4)
    resumed = pool.run(load, replace(case, seed=9), tmp_path, world_size=4)
    for first, then, expected in zip(begun, resumed, straight, strict=True):
        assert kinds(first) + kinds(then) == kinds(expected)
        assert_equal(then[2], expected[2])
