"""What belongs to the model and is not trained: buffers and frozen parameters, of whatever dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from variants import slow_but

import ds_pso
from ds_pso.export.offline import consolidate

from .jobs import Case, config, place

FROZEN = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int64": torch.int64,
    "float8": torch.float8_e4m3fn,
    "complex": torch.complex64,
    "half": torch.bfloat16,
}


def random_tensor(dtype: torch.dtype) -> Tensor:
    if dtype == torch.complex64:
        return torch.randn(5, 3, dtype=dtype)
    return (3 * torch.randn(5, 3)).abs().to(dtype)


class Model(nn.Module):
    """A trained head on a frozen base; batch-norm statistics, a mask, a constant, a table, and a teacher.

    The teacher follows the head, as long as ``teaches``.
    """

    def __init__(self, kinds: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.base = nn.Linear(7, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.teacher = nn.Linear(5, 3).requires_grad_(False)
        for kind in kinds:
            self.register_parameter(f"of_{kind}", nn.Parameter(random_tensor(FROZEN[kind]), requires_grad=False))
        self.register_buffer("mask", torch.triu(torch.full((4, 4), float("-inf")), 1))
        self.register_buffer("big", torch.full((4,), 1e9 / 3))
        self.register_buffer("table", torch.randint(0, 9, (6,)))
        self.teaches = False

    def forward(self, x: Tensor) -> Tensor:
        if self.teaches and self.training:
            self.teacher.weight.data.lerp_(self.head.weight.data.to(self.teacher.weight), 0.5)
        return self.head(torch.tanh(self.norm(self.base(x))))


@dataclass
class Job:
    """A swarm of ``Model``."""

    case: Case
    kinds: tuple[str, ...] = ()

    def start(self) -> tuple[Any, Any, list[Any]]:
        swarm = ds_pso.init(config(self.case, place(self.case)[2]))
        torch.manual_seed(swarm.world.layout.rank)
        model = Model(self.kinds)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=swarm.ds_config)
        swarm.attach(engine)
        records: list[Any] = []
        swarm.on_sync(records.append)
        return swarm, engine, records

    def train(self, swarm: Any, engine: Any, steps: int) -> None:
        for _ in range(steps):
            seed = 1000 * swarm.world.layout.rank + engine.global_steps
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
            engine.backward(engine(x).square().mean())
            engine.step()


def state_of(engine: Any) -> dict[str, np.ndarray]:
    """All that is not trained, as this rank has it."""
    named = {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters() if not p.requires_grad}
    named |= dict(engine.module.named_buffers())
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().copy() for name, t in named.items()}


def differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    return {name for name in one if not np.array_equal(one[name], other[name])}


def start_and_sync(job: Job, folder: Path) -> Any:
    swarm, engine, records = job.start()
    at_start = state_of(engine)
    job.train(swarm, engine, 4)
    swarm.save(folder / "checkpoints")
    swarm.export(folder / "live")
    swarm.close()
    return at_start, state_of(engine), [(r.alive, r.restored) for r in records]


@pytest.mark.parametrize("stage", slow_but((2,), (0, 1, 2, 3)))
def test_all_begin_alike_and_constants_stay(pool: Pool, tmp_path: Path, stage: int) -> None:
    """Whatever the dtype; and the model is exported, with a mask of -inf and a constant that thirds would round."""
    kinds = tuple(FROZEN) if stage < 3 else ("half",)
    job = Job(Case(stage=stage, particles=3), kinds)
    ranks = pool.run(start_and_sync, job, tmp_path, world_size=3)
    for start, end, records in ranks:
        assert differing(start, ranks[0][0]) == set()
        assert differing(end, ranks[0][1]) == set()
        assert differing(start, end) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
        assert records == [((True,) * 3, {})] * 2
    live, offline = load_file(tmp_path / "live" / "model.safetensors"), consolidate(_newest(tmp_path)).state_dict
    assert live.keys() == offline.keys()
    for name, value in live.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), offline[name].reshape(-1).view(torch.uint8)), name
        if name in ranks[0][1]:
            assert value.reshape(-1).view(torch.uint8).tolist() == ranks[0][1][name].tolist(), name


def _newest(folder: Path) -> Path:
    return next(iter(sorted((folder / "checkpoints").glob("step_*"))))


def lose_one(job: Job) -> Any:
    """Particle 2 loses a weight, a table and its statistics, before three syncs; it teaches itself all the time."""
    swarm, engine, records = job.start()
    model, me = engine.module, swarm.particle
    model.teaches = job.case.stage < 3  # where nobody may touch a parameter outside of its module's forward
    job.train(swarm, engine, 2)
    before = state_of(engine)
    for name, value in (("base.weight", 3e38), ("base.weight", 5.0), ("table", 77)):
        if me == 2:
            found = dict(model.named_parameters()) | dict(model.named_buffers())
            tensor = getattr(found[name], "ds_tensor", found[name])
            tensor.data.view(-1)[1] += value
        job.train(swarm, engine, 2)
    swarm.finish_pending()
    model.norm.running_mean[:] = (1.0, 2.0, 7.0)[me]
    if me == 2:
        model.norm.running_var[0] = torch.nan
    mine = model.norm.running_mean.numpy().copy()
    swarm.sync()
    return before, state_of(engine), mine, model.norm.running_mean.numpy(), records, swarm.session.step


@pytest.mark.parametrize("name", slow_but(("zero2", "delay"), ("zero0", "zero2", "zero3", "delay")))
def test_what_one_particle_loses_it_gets_again(pool: Pool, name: str) -> None:
    """And the teachers, which all particles change, stay their own."""
    case = Case(stage=int(name[-1]) if name != "delay" else 2, particles=3, interval=2)
    if name == "delay":
        case = replace(case, interval=2, swarm={"delay": 1})
    ranks = pool.run(lose_one, Job(case), world_size=3)
    for before, after, _, _, records, _ in ranks:
        constant = {"base.weight", "base.bias", "table", "mask", "big"}
        assert not differing(before, after) & constant
        assert not differing(after, ranks[0][1]) & constant
        told = [record.restored for record in records if record.restored]
        assert all(set(found) == {"2"} for found in told)
        # With a delay, the sync that is on its way when something changes does not see it.
        expected = ["base.weight", "base.weight, table"] if name == "delay" else ["base.weight", "base.weight", "table"]
        assert [found["2"].split(", which")[0] for found in told] == expected
        assert records[-1].left_out == {"2": "its buffers are not finite"}
    teachers = {rank[1]["teacher.weight"].tobytes() for rank in ranks}
    assert len(teachers) == (3 if case.stage < 3 else 1)
    mean = (ranks[0][2] + ranks[1][2]) / 2  # of the living, not of all
    for rank in ranks:
        np.testing.assert_allclose(rank[3], mean, rtol=1e-6, atol=1e-7)


def huge_weights(job: Job) -> Any:
    swarm, engine, records = job.start()
    job.train(swarm, engine, 1)
    if swarm.particle == 1:
        for flat in engine.optimizer.single_partition_of_fp32_groups:
            flat.data.mul_(1e4)
    job.train(swarm, engine, 1)
    return records[0].alive


def test_a_large_constant_does_not_hide_huge_weights(pool: Pool) -> None:
    assert pool.run(huge_weights, Job(Case(stage=2)), world_size=2) == [(True, False)] * 2


def load_damaged(job: Job, folder: Path) -> Any:
    """Particle 1 saves a frozen weight that differs, and all load it."""
    swarm, engine, records = job.start()
    before = state_of(engine)
    if swarm.particle == 1:
        engine.module.base.weight.data[0, 0] += 1.0
    swarm.save(folder)
    swarm.load(folder)
    job.train(swarm, engine, 2)
    return before, state_of(engine), records[0].restored


def test_a_difference_that_was_saved_is_found_after_loading(pool: Pool, tmp_path: Path) -> None:
    for before, after, restored in pool.run(load_damaged, Job(Case(stage=2)), tmp_path, world_size=2):
        assert not differing(before, after) & {"base.weight", "base.bias"}
        assert list(restored) == ["1"]
