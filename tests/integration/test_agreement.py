"""All ranks of all particles take the same decision; ties go to the lower index, NaN is the worst."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from variants import slow_but

from .jobs import Case, assert_equal, place, swarm_of, train, working_weights


@dataclass(frozen=True)
class Losses:
    """Replaces the losses of each particle by given numbers, so that the fitness is known."""

    of: tuple[float, ...]
    particles: int

    def __call__(self, step: int, loss: Tensor) -> Tensor:
        particle, _, _ = place(Case(particles=self.particles))
        return loss * 0 + self.of[particle]


def decisions(case: Case, losses: tuple[float, ...] | None) -> tuple[list[dict[str, Any]], Any]:
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine, spoil=Losses(losses, int(case.particles)) if losses else None)
        return records, working_weights(engine)


def common_record(ranks: list[Any]) -> dict[str, Any]:
    """The last sync point's decision, after checking that all ranks took the same."""
    keys = ("sync", "losses", "alive", "best", "weights")
    taken = [[repr([record.get(key) for key in keys]) for record in records] for records, _ in ranks]
    assert all(rank == taken[0] for rank in taken)
    return ranks[0][0][-1]


LOSSES: list[tuple[tuple[float, ...], int]] = [
    ((3.0, 1.0), 1),
    ((1.0, 3.0), 0),
    ((2.0, 2.0), 0),
    ((2.0, math.nan), 0),
    ((math.nan, 2.0), 1),
    ((math.inf, 2.0), 1),
    ((4.0, 2.0, 2.0, 2.5), 1),
    ((math.nan, 2.0, math.inf, 1.0), 3),
]


@pytest.mark.parametrize(("losses", "best"), slow_but([LOSSES[2], LOSSES[-1]], LOSSES), ids=str)
def test_best_particle(pool: Pool, losses: tuple[float, ...], best: int) -> None:
    case = Case(sync_mode="pso", options={"social": 2.0}, particles=len(losses), stage=1)
    ranks = pool.run(decisions, case, losses)
    record = common_record(ranks)
    assert record["best"] == best
    assert list(record["alive"]) == [math.isfinite(loss) for loss in losses]
    for _, weights in ranks:  # social 2 and r 1/2: everybody moves onto the best
        assert_equal(weights, ranks[0][1])


@pytest.mark.parametrize(
    ("sync_mode", "stage"),
    slow_but([("diloco", 3)], product(["local_sgd", "diloco"], [0, 1, 2, 3])),
)
def test_means_are_equal_bits_everywhere(pool: Pool, stage: int, sync_mode: str) -> None:
    ranks = pool.run(decisions, Case(stage=stage, sync_mode=sync_mode), None)
    assert common_record(ranks)["weights"] == (0.5, 0.5)
    for _, weights in ranks:
        assert_equal(weights, ranks[0][1])


def test_losses_are_the_means_over_ranks_and_steps(pool: Pool) -> None:
    ranks = pool.run(own_losses, replace(Case(), interval=4))
    for particle in (0, 1):
        mine = [loss for rank in ranks[2 * particle : 2 * particle + 2] for loss in rank[0]]
        assert ranks[0][1][particle] == pytest.approx(sum(mine) / len(mine), rel=1e-12)
    assert all(rank[1] == ranks[0][1] for rank in ranks)


def own_losses(case: Case) -> tuple[list[float], tuple[float, ...]]:
    with swarm_of(case) as (swarm, engine):
        losses = train(case, engine)
        return losses, swarm.last_losses


def probe_decides(case: Case, values: tuple[float, float]) -> tuple[list[dict[str, Any]], Any]:
    """The probe's loss differs from rank to rank; the mean over a particle's ranks counts."""
    records: list[dict[str, Any]] = []
    with swarm_of(case, attach=False) as (swarm, engine):
        particle, rank, _ = place(case)
        swarm.on_sync(lambda record: records.append(record.to_json()))
        swarm.attach(engine, probe=lambda index: torch.tensor(values[particle] + rank))
        train(case, engine)
        return records, working_weights(engine)


@pytest.mark.parametrize(("values", "best"), [((1.0, 2.0), 0), ((2.0, 1.0), 1)])
def test_a_probe_decides_if_asked_for(pool: Pool, values: tuple[float, float], best: int) -> None:
    case = Case(sync_mode="pso", swarm={"fitness": "probe"})
    record = common_record(pool.run(probe_decides, case, values))
    assert (record["best"], list(record["losses"])) == (best, [value + 0.5 for value in values])
