"""Where two algorithms are the same by their equations, the swarm gives the same weights."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from pool import Pool
from variants import slow_but

from .jobs import Case, Weights, assert_close, build_model, swarm_of, train, working_weights


def final_weights(case: Case) -> Weights:
    with swarm_of(case) as (_, engine):
        train(case, engine)
        return working_weights(engine)


def assert_alike(pool: Pool, one: Case, other: Case) -> None:
    for left, right in zip(pool.run(final_weights, one), pool.run(final_weights, other), strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("stage", slow_but([3], [0, 1, 2, 3]))
def test_local_sgd_at_every_step_is_allreduce(pool: Pool, stage: int) -> None:
    case = Case(stage=stage, interval=1, optimizer="SGD", lr=0.1, seed=0)
    assert_alike(pool, case, replace(case, sync_mode="allreduce"))


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_diloco_with_a_plain_outer_step_is_local_sgd(pool: Pool, stage: int) -> None:
    case = Case(stage=stage, steps=6)
    options = {"outer_lr": 1.0, "outer_momentum": 0.0}
    assert_alike(pool, case, replace(case, sync_mode="diloco", options=options))


def whole_life_without_no_sync(case: Case, folder: Path) -> None:
    def refuse(*_: Any) -> contextlib.AbstractContextManager[None]:
        raise AssertionError("no_sync was used")

    deepspeed.DeepSpeedEngine.no_sync = refuse
    with swarm_of(case) as (swarm, engine):
        assert build_model(case) is not None
        train(case, engine)
        swarm.save(folder / "checkpoint")
        swarm.load(folder / "checkpoint")
        swarm.export(folder / "model")


@pytest.mark.parametrize("stage", [0, 2])
def test_no_sync_is_never_used(pool: Pool, tmp_path: Path, stage: int) -> None:
    pool.run(whole_life_without_no_sync, Case(stage=stage, accumulate=2), tmp_path)
