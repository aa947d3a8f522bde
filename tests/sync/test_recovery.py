"""What a particle that recovers goes on with: the place in training of the donor."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from torch.optim import lr_scheduler as of_torch

from ds_pso.sampler import SwarmSampler
from ds_pso.session.progress import TrainingProgress
from ds_pso.sync.consensus import Consensus
from ds_pso.sync.recovery import at_another_step
from ds_pso.sync.schedule import Observed, ScheduleConfig, make_schedule


def decay(step: int, over: int) -> float:
    return max(0.0, 1 - step / over)


def sequence(optimizer: Any) -> Any:
    parts = [of_torch.LinearLR(optimizer, 0.1, total_iters=5), of_torch.CosineAnnealingLR(optimizer, 30)]
    return of_torch.SequentialLR(optimizer, parts, milestones=[5])


SCHEDULES = {
    "none": lambda optimizer: None,
    "deepspeed": lambda optimizer: WarmupDecayLR(optimizer, 40, warmup_max_lr=0.1, warmup_num_steps=4),
    "cosine": lambda optimizer: of_torch.CosineAnnealingLR(optimizer, 40),
    "partial": lambda optimizer: of_torch.LambdaLR(optimizer, partial(decay, over=40)),
    "milestones": lambda optimizer: of_torch.MultiStepLR(optimizer, [3, 8, 15]),
    "sequence": sequence,
}


def made(schedule: str) -> Any:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2)])
    counters = {"global_steps": 0, "global_samples": 0, "micro_steps": 0, "skipped_steps": 0}
    return SimpleNamespace(basic_optimizer=optimizer, lr_scheduler=SCHEDULES[schedule](optimizer), **counters)


def step(engine: Any) -> list[float]:
    used = [group["lr"] for group in engine.basic_optimizer.param_groups]
    engine.basic_optimizer.step()
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()
    engine.global_steps += 1
    return used


@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_rates_are_those_of_the_donor_from_the_first_step(schedule: str, behind: int) -> None:
    donor, recovered = made(schedule), made(schedule)
    for _ in range(12):
        step(donor)
    for _ in range(behind):
        step(recovered)
    if schedule == "none":
        donor.basic_optimizer.param_groups[0]["lr"] = 0.05  # by hand
    said = json.loads(json.dumps(TrainingProgress(donor, []).read()))
    TrainingProgress(recovered, []).write(said)
    assert recovered.global_steps == 12
    assert [step(recovered) for _ in range(10)] == [step(donor) for _ in range(10)]


def test_samplers_that_are_made_later_begin_at_the_donors_place() -> None:
    data = [SwarmSampler(range(100), rank=rank, world_size=2, batch_size=5) for rank in range(2)]
    for _ in range(13):
        data[0].advance()
    said = TrainingProgress(made("none"), data[:1]).read()
    progress = TrainingProgress(made("none"), [])
    progress.write(said)
    progress.place(data[1])
    assert data[1].state_dict() == data[0].state_dict()
    again = SwarmSampler(range(100), rank=1, world_size=2, batch_size=5)
    progress.place(again)
    assert again.state_dict()["batch"] == 0


def test_who_is_overdue_and_counts_keeps_to_the_interval_of_the_others() -> None:
    options = ScheduleConfig(type="adaptive", drift=0.1)
    donor, overdue = (make_schedule(options, 8, None) for _ in range(2))
    donor.begin(32)
    overdue.load_state_dict(at_another_step(donor.state_dict(), theirs=40, mine=36))
    for schedule, step in ((donor, 40), (overdue, 36)):
        schedule.begin(step)
        schedule.observe(Observed(0.05, 1.0, 0.0))
    assert donor.next_after(40) - 40 == overdue.next_after(36) - 36 == 16


def test_the_own_model_is_looked_at_when_nobody_works_on_it() -> None:
    center = torch.zeros(3)  # half way through a sync in the background
    world = SimpleNamespace(background=SimpleNamespace(settle=lambda: center.fill_(1)))
    frozen = SimpleNamespace(counters=lambda: [])
    shards = SimpleNamespace(
        tensors=[torch.zeros(3)],
        zero_padding=lambda: None,
        buffers=lambda: [],
        frozen=frozen,
        mapped=lambda writes: nullcontext(),
        evaluating=nullcontext,
    )
    updater = SimpleNamespace(rule=SimpleNamespace(model_in="center"), state=[{"center": center}])
    membership = SimpleNamespace(reachable=lambda: (1,))
    parts: Any = SimpleNamespace(world=world, shards=shards, updater=updater, membership=membership)
    (found,) = Consensus(parts).collect("consensus").tensors
    assert found.tolist() == [1, 1, 1]
