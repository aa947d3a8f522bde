"""The bytes of training at every step: against DeepSpeed's own on real ranks, and the time over measured links."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from pool import Pool
from variants import slow_but

from benchmarks.slow_link.report import shares
from benchmarks.slow_link.results import Measured, SlowLinkTable
from benchmarks.slow_link.runs import BANDWIDTHS, Run
from ds_pso.config.cost_model import Cluster, SyncCost, sync_cost
from ds_pso.config.load import load_config
from ds_pso.config.synchronous import synchronous_cost

CLUSTER = Cluster(parameters=7.5e6, particles=2, ranks=1, step_s=0.43, bandwidth=100e6)
TABLE = SlowLinkTable()
PARAMETERS = 7_407_872  # of the model in benchmarks/slow_link

# -- bytes by hand ----------------------------------------------------------------------------

BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("stage", "config", "backend", "bytes_of_an_element"),
    [
        (0, {}, "nccl", 4),  # all-reduce of gradients: 2 (W - 1) / W = 1 time
        (1, {}, "nccl", 4 + 2),  # and all-gather of weights, half of them from the other rank
        (2, {}, "nccl", 4 + 2),
        (3, {}, "nccl", 2 + 2),  # reduce-scatter, all-gather
        (3, {}, "gloo", 4 + 2),
        (3, {"stage3_max_reuse_distance": 0}, "nccl", 2 + 2 + 2),  # gathered in the forward and in the backward pass
        (0, BF16, "nccl", 2),
        (2, BF16, "nccl", 2 + 1),
        (2, {"communication_data_type": "bf16"}, "nccl", 2 + 2),
        (2, BF16 | {"communication_data_type": "fp32"}, "nccl", 4 + 1),
        (1, {"gradient_accumulation_steps": 4}, "nccl", 4 + 2),
        (2, {"gradient_accumulation_steps": 4}, "nccl", 4 * 4 + 2),  # gradients are reduced after each micro batch
        (3, {"gradient_accumulation_steps": 4}, "nccl", 4 * (2 + 2)),
        (2, {"gradient_accumulation_steps": "auto"}, "nccl", 4 + 2),
    ],
)
def test_what_two_ranks_receive(stage: int, config: dict[str, Any], backend: str, bytes_of_an_element: float) -> None:
    zero = {"stage": stage, **{key: value for key, value in config.items() if key.startswith("stage3")}}
    found = synchronous_cost(CLUSTER, config | {"zero_optimization": zero}, backend)
    assert 1e6 * found.megabytes == pytest.approx(7.5e6 * bytes_of_an_element)


def test_the_link_of_a_particle_is_crossed_by_the_ring_of_all_ranks() -> None:
    """Of W = 16 ranks it carries 15 / 16 of an all-gather, though the particle lacks 1 / 2 of it only."""
    found = synchronous_cost(replace(CLUSTER, ranks=8), {"zero_optimization": {"stage": 2}})
    assert 1e6 * found.megabytes == pytest.approx(7.5e6 * (8 + 4) * 15 / 16)
    assert found.transfer_s == pytest.approx(8e6 * found.megabytes / 100e6)
    late = synchronous_cost(replace(CLUSTER, ranks=8, latency_s=0.01), {"zero_optimization": {"stage": 2}})
    assert late.latency_s == pytest.approx(0.01 * 15 * 3)


def test_a_large_model_is_gathered_twice_but_for_its_last_layers() -> None:
    large = replace(CLUSTER, parameters=2e9)
    found = synchronous_cost(large, {"zero_optimization": {"stage": 3}})
    assert 1e6 * found.megabytes == pytest.approx((2e9 + 2e9 + (2e9 - 0.5e9)) * 4 / 2)


def test_gloo_gathers_in_one_direction_at_a_time_between_two_ranks() -> None:
    config = {"zero_optimization": {"stage": 2}}
    nccl, gloo = (synchronous_cost(CLUSTER, config, backend) for backend in ("nccl", "gloo"))
    assert gloo.megabytes == nccl.megabytes
    assert gloo.transfer_s == pytest.approx(nccl.transfer_s * (4 + 2 * 2) / (4 + 2))
    more = replace(CLUSTER, particles=3)
    assert synchronous_cost(more, config, "gloo") == synchronous_cost(more, config, "nccl")


# -- bytes as DeepSpeed asks for them ---------------------------------------------------------


def received(config: dict[str, Any], micro_batches: int) -> tuple[float, int]:
    """Bytes that the collectives of an optimizer step bring this rank, and the number of parameters."""
    import deepspeed
    from deepspeed.comm import comm

    deepspeed.init_distributed("gloo")
    world = comm.get_world_size()
    ring = (world - 1) / world
    counted = 0.0
    backend = comm.cdb

    def count(name: str, size_of: Any, times: float) -> None:
        original = getattr(backend, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            tensor = size_of(args, kwargs)
            counted += times * ring * tensor.numel() * tensor.element_size() if tensor.numel() > 64 else 0
            return original(*args, **kwargs)

        setattr(backend, name, counting)

    def first(key: str) -> Any:
        return lambda args, kwargs: kwargs[key] if key in kwargs else args[0]

    count("all_reduce", first("tensor"), 2)
    count("all_gather_into_tensor", first("output_tensor"), 1)
    count("reduce_scatter_tensor", lambda args, kwargs: kwargs.get("input_tensor", args[1:] and args[1]), 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> None:
        for _ in range(micro_batches):
            batch = torch.ones(2, 256, dtype=torch.bfloat16 if "bf16" in config else torch.float32)
            engine.backward(engine(batch).float().mean())
            engine.step()

    step()
    step()  # ZeRO 3 knows the order of the layers now
    counted = 0.0
    step()
    return counted, 4 * 256 * 256


CASES: list[tuple[int, dict[str, Any]]] = [
    *((stage, {}) for stage in range(4)),
    (2, BF16),
    (2, {"communication_data_type": "bf16"}),
    (1, {"gradient_accumulation_steps": 2}),
    (2, {"gradient_accumulation_steps": 2}),
    (3, {"gradient_accumulation_steps": 2}),
]


@pytest.mark.parametrize(("stage", "more"), slow_but([CASES[2], CASES[3], CASES[7]], CASES))
@pytest.mark.parametrize("world_size", slow_but([2], [2, 4]))
def test_deepspeed_asks_for_these_bytes(pool: Pool, stage: int, more: dict[str, Any], world_size: int) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }
    found = pool.run(received, config, more.get("gradient_accumulation_steps", 1), world_size=world_size)
    cluster = replace(CLUSTER, parameters=found[0][1], particles=2, ranks=world_size // 2)
    expected = 1e6 * synchronous_cost(cluster, config).megabytes
    for counted, _ in found:
        assert counted == pytest.approx(expected, rel=0.01)


# -- time as it was measured ------------------------------------------------------------------


def planned(run: Run, rows: list[Measured]) -> SyncCost:
    alone = median(row.step_s for other, row in TABLE.rows.items() if not other.talks and other.name == run.alone.name)
    cluster = Cluster(PARAMETERS, 2, 1, alone, BANDWIDTHS[run.bandwidth])
    if run.stack == "DeepSpeed":
        return synchronous_cost(cluster, {"zero_optimization": {"stage": run.stage}}, "gloo")
    section = {"particles": 2, "sync_mode": run.rule, "wire": run.wire, "delay": run.delay, "fragments": run.fragments}
    interval = round(median(row.steps_per_sync for row in rows)) or run.interval  # as a schedule has chosen it
    section |= {"sync_interval": interval, "streaming": run.fragments > 1}
    return sync_cost(cluster, load_config({"swarm": section})[1])


SETTINGS = sorted(
    {replace(run, number=0) for run in TABLE.rows if run.talks and run.stack in ("DeepSpeed", "ds_pso")}, key=str
)


@pytest.mark.parametrize("run", SETTINGS, ids=str)
def test_compute_shares_are_those_that_were_measured(run: Run) -> None:
    """Within 15 %: stacks alone differ by up to 12 % from one repetition to another."""
    rows = [row for other, row in TABLE.rows.items() if replace(other, number=0) == run]
    measured = median(shares(TABLE, run.name, run.bandwidth)) / 100
    assert planned(run, rows).compute_share == pytest.approx(measured, rel=0.15)
    moved = median(row.bytes_per_step for row in rows)
    if run.schedule == "fixed":
        assert planned(run, rows).bytes_per_step == pytest.approx(moved, rel=0.02)


def test_the_rows_are_there() -> None:
    assert len(SETTINGS) == 27
    assert sum(run.stack == "DeepSpeed" for run in SETTINGS) == 3
