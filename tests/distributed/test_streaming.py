"""Streaming: each fragment meets by itself, in its turn, and is a swarm of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pool import Pool

from .jobs import Case, Weights, assert_equal, swarm_of, train, working_weights
from .test_delay import RULES
from .test_fragments import numbers_of, records_of, weights_and_pieces, with_a_dead_particle
from .test_truth import assert_true
from .test_wire import flat

TWO = {"streaming": True, "fragments": 2}


@pytest.mark.parametrize(
    ("stage", "particles", "interval", "delay", "fragments"),
    [(0, 2, 4, 2, 2), (1, 2, 6, 1, 3), (2, 4, 4, 1, 2), (3, 2, 4, 2, 2), (2, 2, 6, 2, 3)],
)
def test_every_rule(pool: Pool, stage: int, particles: int, interval: int, delay: int, fragments: int) -> None:
    """Each fragment moves as if it were the whole model, met every interval, and began in its turn."""
    more = {"streaming": True, "delay": delay, "fragments": fragments}
    cases = [
        replace(case, stage=stage, particles=particles, interval=interval, swarm=case.swarm | more)
        for case in RULES.values()
        if "optimizer_state" not in case.swarm
    ]
    ranks = pool.run(weights_and_pieces, cases, world_size=4, timeout=120)
    for index, case in enumerate(cases):
        numbers = numbers_of([pieces[index] for _, pieces in ranks[: 4 // particles]], fragments)
        try:
            assert_true([weights[index] for weights, _ in ranks], case, numbers)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


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
        assert 0 <= first["bytes_received"] + 2 * (5 + 2) * 8 - in_turns <= 4 * 4


def common_and_weights(case: Case) -> list[tuple[np.ndarray, Weights]]:
    """What the wire takes for known to all, after each sync point."""
    found = []
    with swarm_of(case) as (swarm, engine):
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            swarm.world.settle()
            found.append((flat(swarm.synchronizer.updater.differences.common), working_weights(engine)))
    return found


@pytest.mark.parametrize("sync_mode", ["local_sgd", "easgd", "pso"])
def test_with_few_digits_all_know_the_same(pool: Pool, sync_mode: str) -> None:
    case = Case(sync_mode=sync_mode, steps=8, interval=4, swarm={**TWO, "delay": 2, "wire": "int4", "total_steps": 8})
    ranks = pool.run(common_and_weights, case, world_size=4)
    for rank, peer in ((0, 2), (1, 3)):
        for (mine, _), (other, _) in zip(ranks[rank], ranks[peer], strict=True):
            np.testing.assert_array_equal(mine, other)
        first, begun = ranks[rank][0][0], ranks[rank][2][0]
        assert 0 < np.mean(first != begun) < 0.6  # one of the two fragments
    if sync_mode == "local_sgd":
        for rank in ranks[1:]:
            assert_equal(rank[-1][1], ranks[0][-1][1])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_dead_particle_takes_the_whole_model(pool: Pool, stage: int) -> None:
    """It dies before the sync point of the second step, which is therefore one of all fragments, a step later."""
    case = Case(stage=stage, steps=8, interval=4, swarm={**TWO, "delay": 1, "total_steps": 8})
    ranks = pool.run(with_a_dead_particle, case, world_size=4)
    for alive, count, _ in ranks[:2]:
        assert (alive, count) == ([True] * 8, 4)
    for alive, count, _ in ranks[2:]:
        assert (alive, count) == ([True, False, False, False, *[True] * 4], 4)
    for rank in ranks[1:]:
        assert_equal(rank[2], ranks[0][2])
