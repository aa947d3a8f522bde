"""Optimizer and parameters on NVMe: each sync point, checkpoint and export is that of CPU offload, bit for bit."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from variants import slow_but

import ds_pso
from ds_pso.export.offline import consolidate
from ds_pso.swarm import Swarm

from .jobs import Case, assert_equal, build_engine, config, place, train, working_weights

STEPS = 5
SUB_GROUP = 250_000  # elements of a rank


@functools.cache
def why_not() -> str | None:
    """Why DeepSpeed cannot swap here; None if it can."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        if not AsyncIOBuilder().is_compatible():
            return "DeepSpeed's async_io needs libaio and its headers (libaio-dev)"
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        return f"DeepSpeed's async_io cannot be built: {str(error).splitlines()[0]}"
    return None


@pytest.fixture(autouse=True)
def _swapping() -> None:
    if why_not():
        pytest.skip(str(why_not()))


class Wide(nn.Module):
    """Two matrices that are each a sub-group, of more than 1 MiB on each of two ranks; the rest stays in memory.

    All begin at a multiple of 128 elements, without which DeepSpeed loses their gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 512)
        self.up, self.down = nn.Linear(512, 1088, bias=False), nn.Linear(1088, 512, bias=False)
        self.last = nn.Linear(512, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.down(torch.relu(self.up(x))))


def offloaded(case: Case, device: str, folder: Path, *, parameters: bool = False, **options: Any) -> Case:
    zero: dict[str, Any] = {"sub_group_size": SUB_GROUP}
    zero["offload_optimizer"] = {"device": device, "nvme_path": str(folder), "pin_memory": False, **options}
    if parameters:
        zero["offload_param"] = {"device": device, "nvme_path": str(folder), "pin_memory": False, "max_in_cpu": 0}
        zero["offload_param"]["buffer_size"] = 700_000
        zero["stage3_param_persistence_threshold"] = 1000
    return replace(case, stage=3, lr=0.002, deepspeed={**case.deepspeed, "zero_optimization": zero})


def begin(case: Case, folder: Path | None = None) -> tuple[Swarm, Any]:
    swarm = ds_pso.init(config(case, place(case)[2]), run_dir=folder)
    torch.manual_seed(1)
    engine = build_engine(case, swarm.ds_config, Wide())
    x, y = torch.ones(4, 7), torch.zeros(4, 3)
    probe = (lambda index: nn.functional.mse_loss(engine(x), y)) if case.probe else None
    swarm.attach(engine, probe=probe)
    return swarm, engine


def state_of(swarm: Swarm, engine: Any) -> dict[str, np.ndarray]:
    """Masters and optimizer state of this rank, and the working weights."""
    shards = swarm.session.synchronizer.parts.shards
    found = working_weights(engine)
    with shards.mapped(writes=False):
        masters = shards.tensors
        for s in shards.segments:
            part = slice(s.shard_start, s.shard_start + s.numel)
            found[f"master.{s.name}"] = masters[s.shard][part].numpy().copy()
        for number, master in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            for name, value in engine.optimizer.optimizer.state.get(master, {}).items():
                flat = torch.as_tensor(value).detach().float().view(-1)
                if flat.numel() == 1:
                    found[f"state.{number}.{name}"] = flat.numpy().copy()
                    continue
                for s in shards.segments:  # without padding, which is whatever was in memory
                    if s.shard == number:
                        part = slice(s.shard_start, s.shard_start + s.numel)
                        found[f"state.{s.name}.{name}"] = flat[part].numpy().copy()
    return found


def whole_run(case: Case) -> Any:
    swarm, engine = begin(case)
    with swarm:
        losses = train(case, engine, range(STEPS))
        swarm.finish_pending()
        return losses, state_of(swarm, engine)


AVERAGE = Case(precision="bf16", swarm={"optimizer_state": "average"})
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "local_sgd": (Case(precision="bf16"), {}),
    "diloco-average": (Case(sync_mode="diloco", swarm={"optimizer_state": "average"}), {}),
    "reset": (Case(swarm={"optimizer_state": "reset"}), {}),
    "delay-int4": (Case(swarm={"delay": 2, "fragments": 2, "wire": "int4"}), {}),
    "probe": (Case(sync_mode="line_search", probe=True), {}),
    "pipeline": (
        Case(precision="bf16", swarm={"optimizer_state": "average"}),
        {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12},
    ),
    "parameters": (Case(precision="bf16", swarm={"optimizer_state": "average"}), {"parameters": True}),
    "muon": (Case(optimizer="Muon", momentum=0.9, swarm={"optimizer_state": "average"}), {}),
}


@pytest.mark.parametrize("name", slow_but(("diloco-average", "pipeline", "parameters"), CASES))
def test_training_is_that_of_cpu_offload(pool: Pool, tmp_path: Path, name: str) -> None:
    case, options = CASES[name]
    in_memory = offloaded(case, "cpu", tmp_path, parameters=options.get("parameters", False))
    expected = pool.run(whole_run, in_memory, timeout=120)
    for rank, (losses, state) in enumerate(
        pool.run(whole_run, offloaded(case, "nvme", tmp_path, **options), timeout=120)
    ):
        assert losses == expected[rank][0]
        assert_equal(state, expected[rank][1])
    swapped = {path.parent.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.swp")}
    assert swapped == {"particle_0", "particle_1"}


def until(case: Case, folder: Path, stop: int, load: bool, model: Path | None = None) -> Any:
    swarm, engine = begin(case)
    with swarm:
        if load:
            swarm.load(folder)
        train(case, engine, range(engine.global_steps, stop))
        swarm.save(folder)
        if model is not None:
            swarm.export(model)
        return state_of(swarm, engine)


@pytest.mark.parametrize("name", slow_but(("diloco-average",), ("diloco-average", "pipeline", "parameters")))
def test_a_run_goes_on_bit_for_bit(pool: Pool, tmp_path: Path, name: str) -> None:
    case, options = CASES[name]
    case = offloaded(case, "nvme", tmp_path / "swap", **options)
    expected = pool.run(until, case, tmp_path / "whole", STEPS, False, timeout=120)
    pool.run(until, case, tmp_path / "parts", 3, False, timeout=120)
    for path in (tmp_path / "swap").rglob("*.swp"):
        path.unlink()  # another machine
    for rank, state in enumerate(pool.run(until, case, tmp_path / "parts", STEPS, True, timeout=120)):
        assert_equal(state, expected[rank])


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_memory_and_back(pool: Pool, tmp_path: Path) -> None:
    case, _ = CASES["diloco-average"]
    nvme, cpu = offloaded(case, "nvme", tmp_path / "swap"), offloaded(case, "cpu", tmp_path / "swap")
    expected = pool.run(until, cpu, tmp_path / "whole", STEPS, False, timeout=120)
    pool.run(until, nvme, tmp_path / "parts", 2, False, timeout=120)
    pool.run(until, cpu, tmp_path / "parts", 3, True, timeout=120)
    for rank, state in enumerate(pool.run(until, nvme, tmp_path / "parts", STEPS, True, timeout=120)):
        assert_equal(state, expected[rank])


def lone(case: Case, folder: Path, stop: int, load: bool) -> Any:
    """One particle that is plain DeepSpeed; its state by the names of DeepSpeed's own functions."""
    swarm, engine = begin(case)
    with swarm:
        if load:
            swarm.load(folder)
        train(case, engine, range(engine.global_steps, stop), where=(0, place(case)[1], place(case)[2]))
        swarm.save(folder)
        return working_weights(engine)


def test_a_lone_particle_resumes_with_its_moments(pool: Pool, tmp_path: Path) -> None:
    case = offloaded(Case(particles=1), "nvme", tmp_path / "swap")
    expected = pool.run(lone, case, tmp_path / "whole", STEPS, False, world_size=2, timeout=120)
    pool.run(lone, case, tmp_path / "parts", 2, False, world_size=2, timeout=120)
    for rank, weights in enumerate(pool.run(lone, case, tmp_path / "parts", STEPS, True, world_size=2, timeout=120)):
        assert_equal(weights, expected[rank])


def test_exports_from_training_and_from_a_checkpoint_are_equal(pool: Pool, tmp_path: Path) -> None:
    case = offloaded(Case(precision="bf16"), "nvme", tmp_path / "swap")
    ranks = pool.run(until, case, tmp_path / "checkpoints", 3, False, tmp_path / "model", timeout=120)
    live = load_file(tmp_path / "model" / "model.safetensors")
    offline = consolidate(tmp_path / "checkpoints" / "step_00000003").state_dict
    assert live.keys() == offline.keys()
    for name, tensor in live.items():
        assert torch.equal(tensor, offline[name]), name
    size = live["up.weight"].numel() // 2
    halves = [np.concatenate([ranks[r]["master.up.weight"] for r in (start, start + 1)]) for start in (0, 2)]
    assert halves[0].size == 2 * size
    mean = torch.from_numpy((halves[0] + halves[1]) / 2).bfloat16()
    assert torch.equal(live["up.weight"].view(-1), mean)


def onto_another_size(case: Case, folder: Path) -> Any:
    swarm, engine = begin(case)
    with swarm:
        step = swarm.load(folder, reshape=True)
        losses = train(case, engine, range(step, STEPS), where=(place(case)[0], *place(case)[1:]))
        return np.isfinite(losses).all(), working_weights(engine)["up.weight"].shape


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_ranks(pool: Pool, tmp_path: Path) -> None:
    case = offloaded(Case(), "nvme", tmp_path / "swap")
    pool.run(until, case, tmp_path / "parts", 3, False, timeout=120)
    for finite, shape in pool.run(onto_another_size, case, tmp_path / "parts", world_size=2, timeout=120):
        assert finite
        assert shape == (1088, 512)


def with_the_file_itself(case: Case) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        given = config(case, place(case)[2])
        given.pop("swarm")
        given["zero_optimization"]["offload_optimizer"]["nvme_path"] += f"/{place(case)[0]}"
        swarm.attach(build_engine(case, given, Wide()))


def test_particles_must_not_swap_into_one_folder(pool: Pool, tmp_path: Path) -> None:
    for outcome in pool.outcomes(with_the_file_itself, offloaded(Case(), "nvme", tmp_path)):
        assert outcome.kind == "ConfigError", outcome
        assert "and so may other particles; give DeepSpeed, and deepspeed.zero.Init, swarm.ds_config" in outcome.text
