"""A particle whose learning rate is multiplied trains as plain DeepSpeed does with that learning rate, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pool import Pool
from variants import slow_but

from .jobs import Case, assert_equal, build_engine, config, optimizer_state, swarm_of, train, working_weights
from .oracle import follow
from .test_truth import SWARM

STEPS = 6
FACTORS = [1.0, 1.7, 1.7, 0.3, 1.0, 2.6]  # at each step
BASE = Case(interval=100, seed=0, steps=STEPS)
STAGES = {
    "zero0": {"stage": 0},
    "zero1-groups": {"stage": 1, "groups": 2},
    "zero2": {"stage": 2},
    "zero3-sub-groups": {"stage": 3, "deepspeed": {"zero_optimization": {"sub_group_size": 20}}},
    "zero0-bf16": {"stage": 0, "precision": "bf16"},
    "zero0-fp16-fused": {"stage": 0, "precision": "fp16", "fused": True},
    "zero1-bf16-fp32-accumulation": {
        "stage": 1,
        "precision": "bf16",
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "zero3-bf16": {"stage": 3, "precision": "bf16"},
}


def schedule(highest: float) -> dict[str, Any]:
    params = {"total_num_steps": 2 * STEPS, "warmup_max_lr": highest, "warmup_num_steps": 2, "warmup_type": "linear"}
    return {"scheduler": {"type": "WarmupDecayLR", "params": params}}


def rates(engine: Any) -> list[list[float]]:
    """Where a script looks for the learning rate."""
    optimizers = (engine.optimizer, engine.basic_optimizer)
    return [engine.get_lr(), *([group["lr"] for group in o.param_groups] for o in optimizers)]


def swarm(case: Case, factors: list[float]) -> Any:
    """Particle 1 has the factors, particle 0 has none."""
    seen = []
    with swarm_of(case) as (swarm, engine):
        for step, factor in enumerate(factors):
            swarm.session.synchronizer.parts.shards.lr_factor = factor if swarm.particle == 1 else 1.0
            train(case, engine, range(step, step + 1))
            seen.append(rates(engine))
        return working_weights(engine), optimizer_state(engine), seen


def plain(case: Case, particle: int, factors: list[float]) -> Any:
    """DeepSpeed alone, on the data of that particle; its learning rate is set from outside before each step."""
    ds_config = config(case, 2)
    del ds_config["swarm"]
    engine = build_engine(case, ds_config)
    seen = []
    for step, factor in enumerate(factors):
        if "scheduler" not in ds_config:
            for group in engine.optimizer.param_groups:
                group["lr"] = case.lr * factor
        train(case, engine, range(step, step + 1), where=(particle, engine.global_rank, 2))
        seen.append(rates(engine))
    return working_weights(engine), optimizer_state(engine), seen


def assert_same(ranks: list[Any], truth: list[Any]) -> None:
    for mine, expected in zip(ranks, truth, strict=True):
        assert_equal(mine[0], expected[0])
        assert_equal(mine[1], expected[1])


@pytest.mark.parametrize("name", slow_but(("zero3-sub-groups",), STAGES))
def test_without_a_schedule(pool: Pool, name: str) -> None:
    case = replace(BASE, **STAGES[name])
    ranks = pool.run(swarm, case, FACTORS)
    assert_same(ranks[2:], pool.run(plain, case, 1, FACTORS, world_size=2))
    for _, _, seen in ranks:
        assert all(rate == case.lr for moment in seen for place in moment for rate in place)


@pytest.mark.parametrize(
    "name", slow_but(["zero3-sub-groups"], ["zero0", "zero2", "zero3-sub-groups", "zero0-fp16-fused"])
)
def test_with_a_schedule(pool: Pool, name: str) -> None:
    """Twice the rate is exact at every step; what a script sees is the schedule, on both particles."""
    case = replace(BASE, **STAGES[name])
    slow, fast = (replace(case, deepspeed={**case.deepspeed, **schedule(rate)}) for rate in (case.lr, 2 * case.lr))
    ranks = pool.run(swarm, slow, [2.0] * STEPS)
    truth = [pool.run(plain, one, particle, [1.0] * STEPS, world_size=2) for particle, one in enumerate((slow, fast))]
    assert_same(ranks[:2], truth[0])
    assert_same(ranks[2:], truth[1])
    scheduled = truth[0][0][2]
    assert len({moment[0][0] for moment in scheduled}) > 3, "the schedule was to move"
    assert all(seen == scheduled for _, _, seen in ranks)


def factors_of(case: Case) -> tuple[float, Any]:
    with swarm_of(case) as (swarm, engine):
        train(case, engine)
        return swarm.session.synchronizer.parts.shards.lr_factor, rates(engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_swarm_rule_sets_them(pool: Pool, stage: int) -> None:
    case = Case(stage=stage, sync_mode="swarm", steps=6, probe=True, options=SWARM)
    _, oracle = follow(case)
    for rank, (factor, seen) in enumerate(pool.run(factors_of, case)):
        assert factor == pytest.approx(oracle.lr_factors[rank // 2], rel=1e-12)
        assert factor != 1
        assert all(rate == case.lr for place in seen for rate in place)
