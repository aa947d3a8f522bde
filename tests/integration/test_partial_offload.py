"""Partial offload at ZeRO 3: two optimizers in one particle give what one gives, bit for bit.

The sub-groups that stay on the GPU are on the CPU here, by a name of it that DeepSpeed takes for another device; and
torch's AdamW stands for DeepSpeed's, which would have to be compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.runtime.zero import stage3
from pool import Pool
from variants import slow_but

import ds_pso
from ds_pso.swarm import Swarm

from .jobs import Case, assert_equal, build_engine, config, place, train, working_weights

STEPS = 5


@contextlib.contextmanager
def a_device_beside_the_cpu() -> Iterator[None]:
    accelerator = deepspeed.get_accelerator()
    name, adam = accelerator._name, stage3.DeepSpeedCPUAdam
    accelerator._name, stage3.DeepSpeedCPUAdam = "cpu:0", torch.optim.AdamW
    try:
        yield
    finally:
        accelerator._name, stage3.DeepSpeedCPUAdam = name, adam


@contextlib.contextmanager
def swarm_with(case: Case, ratio: float) -> Iterator[tuple[Swarm, Any]]:
    zero = {"sub_group_size": 12, "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": ratio}}
    case = replace(case, stage=3, deepspeed={**case.deepspeed, "zero_optimization": zero})
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        with a_device_beside_the_cpu():
            engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        yield swarm, engine


def state_of(engine: Any) -> dict[str, np.ndarray]:
    """The state of every sub-group, whichever optimizer has it, and the working weights."""
    optimizers, found = [engine.optimizer.optimizer], working_weights(engine)
    if hasattr(engine.optimizer, "backup_optimizer"):
        optimizers.append(engine.optimizer.backup_optimizer)
    for number, master in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        found[f"master.{number}"] = master.detach().numpy().copy()
        states = [optimizer.state[master] for optimizer in optimizers if optimizer.state.get(master)]
        assert len(states) <= 1, "two optimizers have trained one sub-group"
        for name, value in states[0].items() if states else ():
            found[f"{number}.{name}"] = value.numpy().copy()
    return found


def by_both(engine: Any) -> bool:
    masters = engine.optimizer.fp32_partitioned_groups_flat
    backup = [engine.optimizer.backup_optimizer.state.get(master) for master in masters]
    return any(backup) and not all(backup)


def run(case: Case, ratio: float) -> Any:
    with swarm_with(case, ratio) as (swarm, engine):
        if swarm.particle == 1:
            swarm.session.synchronizer.parts.shards.lr_factor = FACTOR
        losses = train(case, engine, range(STEPS))
        if ratio < 1 and case.swarm.get("optimizer_state") != "reset":
            assert by_both(engine)
        return losses, state_of(engine)


CASES: dict[str, Case] = {
    "keep": Case(groups=2),
    "average": Case(precision="bf16", swarm={"optimizer_state": "average"}),
    "reset": Case(swarm={"optimizer_state": "reset"}),
    "int4": Case(sync_mode="diloco", swarm={"wire": "int4"}),
}
FACTOR = 1.7  # of particle 1's learning rate


@pytest.mark.parametrize("name", slow_but(("average", "reset"), CASES))
def test_it_trains_as_whole_offload_does(pool: Pool, name: str) -> None:
    expected = pool.run(run, CASES[name], 1.0)
    for rank, (losses, state) in enumerate(pool.run(run, CASES[name], 0.5)):
        assert losses == expected[rank][0]
        assert_equal(state, expected[rank][1])


def until(case: Case, folder: Path, stop: int, load: bool) -> Any:
    with swarm_with(case, 0.5) as (swarm, engine):
        if load:
            swarm.load(folder)
            assert by_both(engine)
        train(case, engine, range(engine.global_steps, stop))
        swarm.save(folder)
        assert by_both(engine), "saving has moved the state"
        return state_of(engine)


def test_it_goes_on_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    case = CASES["average"]
    expected = pool.run(until, case, tmp_path / "whole", STEPS, False)
    pool.run(until, case, tmp_path / "parts", 3, False)
    for rank, state in enumerate(pool.run(until, case, tmp_path / "parts", STEPS, True)):
        assert_equal(state, expected[rank])


def with_a_schedule(case: Case) -> Any:
    with (
        pytest.warns(UserWarning, match="not pass the learning-rate schedule on")
        if place(case)[:2] == (0, 0)
        else (contextlib.nullcontext()),
        swarm_with(case, 0.5) as (_, engine),
    ):
        train(case, engine, range(3))
        optimizer = engine.optimizer
        return optimizer.optimizer.param_groups[0]["lr"], optimizer.backup_optimizer.param_groups[0]["lr"]


def test_deepspeed_does_not_pass_a_schedule_on(pool: Pool) -> None:
    """Which attach warns of: if this fails, DeepSpeed has learned it, and the warning can go."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 10}}
    for first, second in pool.run(with_a_schedule, Case(deepspeed={"scheduler": schedule})):
        assert first != second == Case().lr
