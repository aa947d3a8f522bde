"""Rules that try weights on the probe batch: all ranks see the same scores, the true ones, and take the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from torch import Tensor
from variants import slow_but

from .jobs import (
    Case,
    assert_close,
    assert_equal,
    one_after_the_other,
    place,
    probe_of,
    swarm_of,
    train,
    working_weights,
)
from .oracle import follow
from .test_truth import SWARM

SWARM_CASE = Case(sync_mode="swarm", steps=6, probe=True, options=SWARM)
SEARCH_CASE = Case(sync_mode="line_search", steps=8, probe=True)


@dataclass(frozen=True)
class Lie:
    """Added to the losses that a particle reports: its fitness changes, its gradients do not."""

    by: tuple[float, ...]

    def __call__(self, step: int, loss: Tensor) -> Tensor:
        return loss + self.by[place(Case(particles=len(self.by)))[0]]


def decisions(cases: list[Case], lies: list[tuple[float, ...]]) -> list[Any]:
    found = []
    for lie, (case, swarm, engine) in zip(lies, one_after_the_other(cases), strict=True):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record, records=records: records.append(record.to_json()))
        train(case, engine, spoil=Lie(lie))
        found.append((records, working_weights(engine)))
    return found


@pytest.mark.parametrize(("stage", "particles"), slow_but([(3, 2)], [(0, 2), (1, 4), (2, 2), (3, 2)]))
def test_the_better_one_wins(pool: Pool, stage: int, particles: int) -> None:
    # Nearly the best particle alone, which the mean of all can beat.
    sharp = replace(SWARM_CASE, lr=0.1, options=SWARM | {"temperature": 0.001})
    cases = [replace(case, stage=stage, particles=particles) for case in (SWARM_CASE, sharp, SEARCH_CASE)]
    honest = (0.0,) * particles
    lying = (1.0,) * (particles - 1) + (0.0,)  # the last, whose data is the noisiest, looks best, which raises doubt
    lies = [honest, lying, honest]
    ranks = pool.run(decisions, cases, lies)
    keys = ("sync", "guard", "guard_scores", "inertia", "scores", "lr_factors")
    winners = []
    for case, lie, *of_ranks in zip(cases, lies, *ranks, strict=True):
        _, oracle = follow(case, lie)
        told = [[repr([record.get(key) for key in keys]) for record in records] for records, _ in of_ranks]
        assert all(rank == told[0] for rank in told), "ranks disagree"
        for _, weights in of_ranks:
            assert_equal(weights, of_ranks[0][1])
        records = of_ranks[0][0]
        if case.sync_mode == "swarm":
            records = [record for record in records if "guard_scores" in record]
            scores = [list(record["guard_scores"].values()) for record in records]
            chosen, truth, expected = [record["guard"] for record in records], oracle.scores, oracle.winners
        else:  # at the first sync point there is nothing to search
            scores = [list(record["scores"]) for record in records[1:]]
            lengths = [record["inertia"] / 0.7 for record in records[1:]]
            chosen = [round(length * (particles - 1) / 1.5) for length in lengths]
            truth, expected = oracle.scores[1:], oracle.winners[1:]
        np.testing.assert_allclose(scores, truth, rtol=1e-5)
        assert chosen == expected
        winners.append(set(chosen))
    assert winners[0] | winners[1] == {"mean", "weighted"}, "the guard was to decide both ways"
    assert winners[2] == {0, particles - 1}, "the search, too"


def probe_of_nan(case: Case, mad: tuple[int, ...]) -> Any:
    """The probe's loss is not finite on some launcher's ranks."""
    records: list[dict[str, Any]] = []
    with swarm_of(case, attach=False) as (swarm, engine):
        real = probe_of(case, engine)
        swarm.on_sync(lambda record: records.append(record.to_json()))
        swarm.attach(engine, probe=lambda index: real(index) * (math.nan if swarm.world.layout.rank in mad else 1))
        train(case, engine)
        return records, working_weights(engine)


@pytest.mark.parametrize(
    "mad", [(3,), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)], ids=["one rank", "all ranks"]
)
@pytest.mark.parametrize("sync_mode", ["swarm", "line_search"])
def test_scores_that_are_not_finite_choose_nothing(pool: Pool, sync_mode: str, mad: tuple[int, ...]) -> None:
    case = replace(SWARM_CASE if sync_mode == "swarm" else SEARCH_CASE, stage=2)
    ranks = pool.run(probe_of_nan, case, mad)
    for records, weights in ranks:
        assert_equal(weights, ranks[0][1])
        for record in records:
            assert list(record["alive"]) == [True, True]
            assert record.get("guard") in (None, "mean")
            assert record.get("inertia", 0) == 0
            if "scores" in record:
                assert [math.isinf(score) for score in record["scores"]] == [len(mad) > 1, True]
        assert {"guard", "scores"} & set().union(*records), "nothing was scored"


def lose_the_weights(case: Case, mad: int) -> Any:
    """All weights of a particle are NaN just before the second sync point."""
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))
        if swarm.particle == mad:
            for tensor in swarm.session.synchronizer.parts.shards.tensors:
                tensor.fill_(math.nan)
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        swarm.sync()
        after = working_weights(engine)
        train(case, engine, range(3, 6))
        state = [value.clone() for state in swarm.session.synchronizer.parts.updater.state for value in state.values()]
        return records[0], after, all(bool(torch.isfinite(value).all()) for value in state), working_weights(engine)


@pytest.mark.parametrize("mad", slow_but([0], [0, 1]))
@pytest.mark.parametrize("stage", slow_but([3], [0, 3]))
@pytest.mark.parametrize("sync_mode", ["swarm", "line_search"])
def test_a_particle_of_nan_starts_again_from_the_consensus(pool: Pool, sync_mode: str, stage: int, mad: int) -> None:
    guarded = replace(SWARM_CASE, options=SWARM | {"fitness_steps": 1})
    case = replace(guarded if sync_mode == "swarm" else SEARCH_CASE, stage=stage)
    ranks = pool.run(lose_the_weights, case, mad)
    assert "guard" in ranks[0][0] or "scores" in ranks[0][0], "the sync point was to score something"
    for record, after, state_is_finite, later in ranks:
        assert list(record["alive"]) == [mad == 1, mad == 0]
        assert_close(after, ranks[0][1], rtol=0, atol=0)
        assert state_is_finite
        assert all(np.isfinite(value).all() for part in (after, later) for value in part.values())
