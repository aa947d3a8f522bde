"""A particle whose loss, gradients or weights are not finite arrives all the same, and is recovered.

Its NaN reaches nobody; the others go on as if it had not been there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from integration.jobs import Case, assert_close, assert_equal, optimizer_state, place, swarm_of, train, working_weights
from pool import Pool
from torch import Tensor
from variants import slow_but

RULES: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "diloco": {},
    "pso": {"inertia": 0.3, "cognitive": 0.5, "best": "all_time"},
}
# With which the particles do not leave a sync point alike.
APART = {"pso", "easgd", "noloco", "nosync"}
LATER_RULES: dict[str, Case] = {
    "easgd": Case(sync_mode="easgd"),
    "noloco": Case(sync_mode="noloco"),
    "nosync": Case(sync_mode="nosync", swarm={"total_steps": 6}),
    "swarm": Case(sync_mode="swarm", probe=True, options={"fitness_steps": 2, "unequal_above": 1e-6}),
    "line_search": Case(sync_mode="line_search", probe=True),
    "pso": Case(
        sync_mode="pso",
        options={"topology": "ring", "randomness": "per_tensor", "best": "all_time", "cognitive": 0.5},
        swarm={"optimizer_state": "average"},
    ),
}


@dataclass(frozen=True)
class Spoil:
    """Multiplies the loss of one particle, on one of its ranks or all, at one step."""

    by: float
    particle: int
    step: int = 2
    rank: int | None = None  # None: all ranks of the particle

    def __call__(self, step: int, loss: Tensor) -> Tensor:
        particle, rank, _ = place(Case())
        hit = (particle, step) == (self.particle, self.step) and self.rank in (None, rank)
        return loss * self.by if hit else loss


def job(case: Case, spoil: Spoil) -> Any:
    """Six steps, three sync points; the particle goes diverged before the second."""
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        applied = []
        for step in range(6):
            train(case, engine, range(step, step + 1), spoil=spoil)
            applied.append(engine.was_step_applied())
            if step == 3:
                at_sync = working_weights(engine)
        state = {k: v.numpy().copy() for s in swarm.session.synchronizer.parts.updater.state for k, v in s.items()}
        return records, at_sync, working_weights(engine), optimizer_state(engine), state, applied


def assert_sane(ranks: list[Any]) -> None:
    for records, *tensors, _ in ranks:
        assert len(records) == 3
        for group in tensors:
            for name, value in group.items():
                assert np.isfinite(value).all(), name


@pytest.mark.parametrize("sync_mode", slow_but(["local_sgd", "pso"], RULES))
@pytest.mark.parametrize(
    ("stage", "mad"), slow_but([(3, 1)], product([0, 1, 2, 3], [0, 1])), ids=lambda value: f"{value}"
)
def test_a_nan_loss(pool: Pool, stage: int, mad: int, sync_mode: str) -> None:
    """In pure fp32 at stage 0 the NaN reaches the weights, at the other stages the step is skipped."""
    case = Case(stage=stage, sync_mode=sync_mode, options=RULES[sync_mode])
    assert_recovered(pool.run(job, case, Spoil(math.nan, mad)), case, mad)


def assert_recovered(ranks: list[Any], case: Case, mad: int) -> None:
    assert_sane(ranks)
    for records, *_ in ranks:
        assert [list(record["alive"]) for record in records] == [[True, True], [mad != 0, mad != 1], [True, True]]
    if case.sync_mode not in APART:
        for rank in ranks:  # one common state, made by the healthy particle alone
            assert_equal(rank[1], ranks[0][1])
    if case.sync_mode == "pso":
        assert ranks[0][0][1]["best"] != mad


@pytest.mark.parametrize(
    ("rule", "stage", "mad"),
    slow_but(
        [(rule, 3, 0) for rule in list(LATER_RULES)[::2]],
        [(rule, *other) for rule in LATER_RULES for other in ((0, 1), (3, 0))],
    ),
)
def test_a_nan_loss_under_the_later_rules(pool: Pool, rule: str, stage: int, mad: int) -> None:
    case = replace(LATER_RULES[rule], stage=stage)
    ranks = pool.run(job, case, Spoil(math.nan, mad))
    assert_recovered(ranks, case, mad)
    healthy, recovered = ranks[2 * (1 - mad)], ranks[2 * mad]
    if rule == "nosync":  # it is the only one that lives, and so the mean
        assert_equal(recovered[1], healthy[1])


def test_nan_on_one_rank_is_the_whole_particle(pool: Pool) -> None:
    ranks = pool.run(job, Case(stage=2), Spoil(math.nan, particle=1, rank=1))
    assert_sane(ranks)
    assert [list(rank[0][1]["alive"]) for rank in ranks] == [[True, False]] * 4


@pytest.mark.parametrize(
    ("sync_mode", "stage"),
    slow_but([("local_sgd", 2)], product(["local_sgd", "pso"], [0, 1, 2, 3])),
)
def test_an_fp16_overflow(pool: Pool, stage: int, sync_mode: str) -> None:
    """The step is skipped, the loss is finite: the particle counts, with the weights it had."""
    swarm = {"quarantine_loss": None}  # what overflows here is the loss that is reported
    case = Case(stage=stage, precision="fp16", sync_mode=sync_mode, swarm=swarm)
    ranks = pool.run(job, case, Spoil(1e7, particle=1))
    assert_sane(ranks)
    for number, (records, *_, applied) in enumerate(ranks):
        assert list(records[1]["alive"]) == [True, True]
        assert applied == [True, True, number < 2, True, True, True]


def diverged_weights(case: Case, mad: int, what: float) -> Any:
    """The weights of one rank's shard go bad just before the sync, though its loss looks well."""
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(1))
        particle, rank, _ = place(case)
        before = working_weights(engine)
        if (particle, rank) == (mad, 1):
            segment = swarm.session.synchronizer.parts.shards.segments[-1]  # a real element, not padding
            swarm.session.synchronizer.parts.shards.tensors[segment.shard][segment.shard_start] = what
        swarm.sync()
        after = working_weights(engine)
        train(case, engine, range(1, 2))
        return before, after, optimizer_state(engine), working_weights(engine)


@pytest.mark.parametrize(
    ("stage", "sync_mode", "what"),
    slow_but(
        [(3, "local_sgd", math.inf), (3, "pso", math.nan)],
        product([0, 2, 3], ["local_sgd", "pso"], [math.nan, math.inf]),
    ),
    ids=str,
)
def test_bad_weights(pool: Pool, stage: int, sync_mode: str, what: float) -> None:
    case = Case(stage=stage, interval=100, sync_mode=sync_mode)
    ranks = pool.run(diverged_weights, case, 0, what)
    healthy = ranks[2][0]
    for before, after, moments, later in ranks:
        assert_close(after, healthy)  # the only one alive is the mean, and the best
        assert all(np.isfinite(value).all() for part in (before, moments, later) for value in part.values())


def everybody_mad(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(2), spoil=lambda step, loss: loss * math.nan)
        torch.manual_seed(0)
        return swarm.totals.count, working_weights(engine)


EVERY_RULE = [*(Case(sync_mode=name, options=options) for name, options in RULES.items()), *LATER_RULES.values()]


@pytest.mark.parametrize("case", slow_but(EVERY_RULE[::3], EVERY_RULE), ids=lambda case: case.sync_mode)
def test_a_swarm_diverged_hangs_nobody(pool: Pool, case: Case) -> None:
    """With no particle alive a sync point changes nothing; at stage 2 the steps were skipped."""
    ranks = pool.run(everybody_mad, case)
    for count, weights in ranks:
        assert count == 1
        assert_equal(weights, ranks[0][1])
        assert all(np.isfinite(value).all() for value in weights.values())
