"""Save, end, resume in fresh processes: bit for bit what a run without interruption gives."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from variants import slow_but

from ds_pso.swarm import Swarm

from .jobs import Case, assert_equal, optimizer_state, place, swarm_of, train, working_weights
from .test_publish import BF16_MASTERS
from .test_truth import SWARM

RULES: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "diloco": {},
    "pso": {"inertia": 0.3, "cognitive": 0.5, "best": "all_time", "randomness": "per_sync"},
}
# What else lives from one sync point to the next; ``swarm`` compares losses over 3 steps, so over two sync points.
LATER_RULES: dict[str, Case] = {
    "easgd": Case(sync_mode="easgd", swarm={"optimizer_state": "average"}),
    "nosync": Case(sync_mode="nosync", swarm={"total_steps": 7, "optimizer_state": "reset"}),
    "pso": Case(
        sync_mode="pso",
        swarm={"total_steps": 7},
        options={"randomness": "per_tensor", "final_inertia": 0.5, "velocity_clamp": 0.01, "topology": "ring"},
    ),
    "swarm": Case(sync_mode="swarm", probe=True, options=SWARM),
    "swarm-windows": Case(sync_mode="swarm", probe=True, options=SWARM | {"fitness_steps": 3}),
    "line_search": Case(sync_mode="line_search", probe=True),
    # At steps 3 and 5 a sync point is pending.
    "delay": Case(sync_mode="easgd", swarm={"delay": 2, "wire": "int8"}),
    "delay-diloco": Case(sync_mode="diloco", swarm={"delay": 1}),
    "int4": Case(sync_mode="diloco", swarm={"wire": "int4"}),
    "bf16": Case(sync_mode="easgd", swarm={"wire": "bf16"}),
    "sparse": Case(sync_mode="diloco", swarm={"wire": "sparse", "sparse": {"density": 0.002}, "residual_decay": 0.9}),
    "muon": Case(
        optimizer="Muon",
        momentum=0.9,
        swarm={"wire": "sparse", "sparse": {"density": 0.002}, "residual": "weights", "delay": 1},
    ),
    "moments": Case(
        swarm={"optimizer_state": "average", "moments": {"first_every": 1, "second_every": 2, "wire": "int8"}}
    ),
    # At step 3 the first sync point is pending, and at 5 the second one.
    "moments-delay": Case(
        sync_mode="diloco",
        swarm={
            "optimizer_state": "average",
            "delay": 2,
            "wire": "int4",
            "moments": {"second_every": 2, "wire": "int4"},
        },
    ),
    "rough-state": Case(sync_mode="diloco", swarm={"wire": "int4", "state_dtype": "bf16"}),
    "streaming": Case(
        sync_mode="pso",
        interval=4,
        options={"inertia": 0.3, "cognitive": 0.5},
        swarm={"delay": 2, "fragments": 2, "streaming": True},
    ),
    # The drift decides, not the time: with this share of it sync points may take what they like.
    # Saved at step 5 while the one of step 4 is pending; at 3 that of step 2.
    "adaptive-delay": Case(
        interval=2,
        swarm={
            "delay": 2,
            "fragments": 2,
            "schedule": {"type": "adaptive", "drift": 0.03, "compute_share": 0, "min_interval": 2},
        },
    ),
    "adaptive": Case(
        interval=1, swarm={"schedule": {"type": "adaptive", "drift": 0.03, "compute_share": 0, "warmup_steps": 1}}
    ),
}
STEPS = 7
# Dropout needs the random state, BatchNorm the buffers; 44 samples are 2 steps an epoch.
BASE = Case(dropout=0.3, batch_norm=True)
HALF = Case(dropout=0.3)  # on a CPU torch's BatchNorm1d refuses the fp32 buffers that DeepSpeed leaves it


def train_from_loader(case: Case, swarm: Swarm, engine: Any, steps: int, folder: Path | None, stop: int | None) -> Any:
    """Train up to step ``steps``; save at step ``stop``. What is left at the end, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(44, 7, generator=generator), torch.randn(44, 3, generator=generator))
    sampler = swarm.sampler(data)
    # Beginning an epoch draws from the random state of the dropout; the resumed run begins one epoch more.
    loader = DataLoader(data, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    seen = []
    if folder is not None and stop is None:
        assert swarm.load(folder) == engine.global_steps
    while engine.global_steps < steps:
        for x, y in loader:
            noise = 1e-3 * (random.random() + float(np.random.rand()))
            loss = nn.functional.mse_loss(engine(x.to(case.dtype) + noise).float(), y)
            engine.backward(loss)
            engine.step()
            seen.append(loss.item())
            if engine.global_steps == stop:
                swarm.save(folder)
            if engine.global_steps == steps:
                break
    swarm.world.background.settle()  # a sync point may still go on
    synchronizer = swarm.session.synchronizer
    return {
        "weights": working_weights(engine),
        "moments": optimizer_state(engine),
        "rule": {
            f"{i}.{k}": v.float().numpy() for i, s in enumerate(synchronizer.parts.updater.state) for k, v in s.items()
        },
        "wire": wire_state(synchronizer),
        "lr_factor": synchronizer.parts.shards.lr_factor,
        "numbers": repr(
            [
                [dict(memory) for memory in synchronizer.parts.memories],
                synchronizer.parts.assessor.losses,
                synchronizer.parts.totals.count,
                synchronizer.parts.totals.bytes_received,
                synchronizer.parts.schedule.state_dict(),
                swarm.session.window.state(),
                synchronizer.parts.assessor.highest_loss,
                sampler.state_dict(),
                [random.random(), float(np.random.rand()), torch.rand(1).item()],
                [engine.global_steps, engine.global_samples, engine.get_lr()],
                seen[-2:],
            ]
        ),
    }


def wire_state(synchronizer: Any) -> dict[str, np.ndarray]:
    if synchronizer.parts.moments is not None:
        residuals = synchronizer.parts.moments.residuals()
        return {name: residual.float().numpy().copy() for name, residual in residuals.items()}
    differences = synchronizer.parts.updater.differences
    if differences is None:
        return {}
    named = {"common": differences.common, "residual": differences.residual}
    return {f"{name}.{i}": t.float().numpy().copy() for name, tensors in named.items() for i, t in enumerate(tensors)}


def job(case: Case, steps: int, folder: Path | None, stop: int | None) -> Any:
    with swarm_of(case) as (swarm, engine):
        random.seed(swarm.world.layout.rank)
        np.random.seed(swarm.world.layout.rank)
        return train_from_loader(case, swarm, engine, steps, folder, stop)


def assert_same(ranks: list[Any], truth: list[Any]) -> None:
    for mine, expected in zip(ranks, truth, strict=True):
        for key in ("weights", "moments", "rule", "wire"):
            assert_equal(mine[key], expected[key])
        for key in ("numbers", "lr_factor"):
            assert mine[key] == expected[key]


def assert_resumes(pool: Pool, case: Case, folder: Path, stop: int) -> list[Any]:
    truth = pool.run(job, case, STEPS, folder, stop)
    # Another seed: everything must come from the checkpoint.
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, folder, None), truth)
    return truth


# An epoch has two steps: at 3 both the window and the epoch are half full.
@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        pytest.param(0, 3, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.slow),
        (2, 3),
        (3, 3),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
    ids=lambda number: f"{number}",
)
@pytest.mark.parametrize("sync_mode", slow_but(("pso",), RULES))
def test_resume_is_bit_exact(pool: Pool, tmp_path: Path, sync_mode: str, stage: int, stop: int) -> None:
    case = replace(BASE, stage=stage, sync_mode=sync_mode, options=RULES[sync_mode])
    assert_resumes(pool, case, tmp_path, stop)


@pytest.mark.parametrize(("stage", "stop"), [pytest.param(0, 5, marks=pytest.mark.slow), (3, 3)])
@pytest.mark.parametrize("rule", slow_but(("streaming",), LATER_RULES))
def test_resume_of_the_later_rules(pool: Pool, tmp_path: Path, rule: str, stage: int, stop: int) -> None:
    case = replace(LATER_RULES[rule], stage=stage, dropout=BASE.dropout, batch_norm=True)
    truth = assert_resumes(pool, case, tmp_path, stop)
    if case.sync_mode == "swarm":
        assert all(rank["lr_factor"] != 1 for rank in truth)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(HALF, stage=0, precision="bf16"), marks=pytest.mark.slow),
        replace(HALF, stage=0, precision="fp16", fused=True),
        pytest.param(
            replace(HALF, stage=1, precision="bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(HALF, stage=2, precision="fp16", groups=2), marks=pytest.mark.slow),
        pytest.param(replace(HALF, stage=3, precision="bf16"), marks=pytest.mark.slow),
        replace(HALF, stage=2, precision="bf16", deepspeed=BF16_MASTERS),
        pytest.param(replace(HALF, stage=3, precision="bf16", deepspeed=BF16_MASTERS), marks=pytest.mark.slow),
        replace(
            HALF,
            stage=3,
            deepspeed={
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
            },
        ),
    ],
    ids=lambda case: (
        f"{case}{'-fused' if case.fused else ''}{'-offload' if 'zero_optimization' in case.deepspeed else ''}"
        f"{'-masters' if 'bf16' in case.deepspeed else ''}"
    ),
)
def test_resume_in_half_precision_and_with_offload(pool: Pool, tmp_path: Path, case: Case) -> None:
    assert_resumes(pool, replace(case, sync_mode="diloco"), tmp_path, stop=3)


def test_saving_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    case = replace(BASE, stage=2, sync_mode="pso", options=RULES["pso"])
    assert_same(pool.run(job, case, STEPS, tmp_path, 3), pool.run(job, case, STEPS, None, None))


def test_a_schedule_and_a_second_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """The learning rate goes on where it was, and the newest checkpoint wins."""
    schedule = {
        "type": "WarmupHoldDecayLR",
        "params": {"total_num_steps": STEPS, "warmup_max_lr": 0.02, "warmup_num_steps": 2, "decay_ratio": 0.5},
    }
    case = replace(BASE, stage=1, deepspeed={"scheduler": schedule})
    pool.run(job, case, 2, tmp_path, 2)
    truth = pool.run(job, case, STEPS, tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000005"]
    assert_same(pool.run(job, case, STEPS, tmp_path, None), truth)


def judged(case: Case, folder: Path, loud: set[int], stop: int | None) -> Any:
    """Losses are small but at ``loud`` steps, and from step 4 on those of particle 1 are not as small."""

    def spoil(step: int, loss: torch.Tensor) -> torch.Tensor:
        return loss * (30.0 if step in loud else 12.0 if step >= 4 and place(case)[0] == 1 else 0.05)

    with swarm_of(case) as (swarm, engine):
        if stop is None:
            swarm.load(folder)
        else:
            train(case, engine, range(stop), spoil)
            swarm.save(folder)
        judged_by = swarm.session.window.state(), swarm.session.synchronizer.parts.assessor.highest_loss
        records: list[Any] = []
        swarm.on_sync(lambda record: records.append((record.sync, record.alive, record.left_out)))
        train(case, engine, range(engine.global_steps, case.steps), spoil)
        return records, repr(judged_by), working_weights(engine)


@pytest.mark.parametrize(("loud", "stop"), [({0}, 2), ({1, 2, 3}, 6)], ids=["before the first sync", "later"])
def test_what_losses_are_judged_by_is_resumed(pool: Pool, tmp_path: Path, loud: set[int], stop: int) -> None:
    """The very first loss, and the highest at a sync: without them particle 1 would be left out."""
    case = Case(interval=4, steps=10)
    truth = pool.run(judged, case, tmp_path, loud, stop, world_size=2)
    resumed = pool.run(judged, case, tmp_path, loud, None, world_size=2)
    for mine, expected in zip(resumed, truth, strict=True):
        assert expected[0]
        assert all(all(alive) for _, alive, _ in expected[0])
        assert mine[:2] == expected[:2]
        assert_equal(mine[2], expected[2])
