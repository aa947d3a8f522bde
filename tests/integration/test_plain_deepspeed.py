"""One particle, or ``allreduce``, is DeepSpeed without ds_pso, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

from .jobs import Case, assert_equal, build_engine, config, optimizer_state, place, swarm_of, train, working_weights

CASES = [
    *(Case(stage=stage, batch_norm=True, dropout=0.2) for stage in (0, 1, 2, 3)),
    *(Case(stage=stage, precision="bf16", dropout=0.2) for stage in (0, 2, 3)),
    Case(stage=1, precision="fp16", dropout=0.2),
    Case(stage=2, accumulate=2, groups=2, batch_norm=True),
]


def plain(case: Case) -> Any:
    """The job without ds_pso."""
    ds_config = config(case, place(case)[2])
    del ds_config["swarm"]
    engine = build_engine(case, ds_config)
    return train(case, engine), working_weights(engine), optimizer_state(engine)


def swarm(case: Case) -> Any:
    with swarm_of(case) as (_, engine):
        return train(case, engine), working_weights(engine), optimizer_state(engine)


def assert_same(pool: Pool, case: Case, world_size: int) -> None:
    expected = pool.run(plain, case, world_size=world_size)
    for (losses, weights, moments), truth in zip(pool.run(swarm, case, world_size=world_size), expected, strict=True):
        np.testing.assert_array_equal(losses, truth[0])
        assert_equal(weights, truth[1])
        assert_equal(moments, truth[2])


@pytest.mark.parametrize("case", slow_but(CASES[3:5:2] + CASES[8:], CASES), ids=str)
def test_allreduce_is_one_world(pool: Pool, case: Case) -> None:
    assert_same(pool, replace(case, sync_mode="allreduce", particles=2), world_size=4)


@pytest.mark.parametrize("case", slow_but(CASES[:5:2], CASES[:5]), ids=str)
@pytest.mark.parametrize("sync_mode", slow_but(["pso"], ["local_sgd", "easgd", "pso"]))
def test_one_particle(pool: Pool, case: Case, sync_mode: str) -> None:
    assert_same(pool, replace(case, sync_mode=sync_mode, particles=1, interval=1), world_size=2)


def test_one_particle_whose_outer_step_goes_where_it_is(pool: Pool) -> None:
    options = {"outer_lr": 1, "outer_momentum": 0}
    assert_same(pool, replace(CASES[2], sync_mode="diloco", options=options, particles=1, interval=1), world_size=2)


def test_one_particle_of_one_rank(pool: Pool) -> None:
    assert_same(pool, Case(stage=2, particles=1, interval=1), world_size=1)
