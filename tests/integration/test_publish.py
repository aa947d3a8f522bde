"""After a sync every rank works with the cast of the new fp32 masters, and the masters are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from variants import slow_but

from .jobs import (
    Case,
    Net,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    master_pieces,
    particle_batch,
    swarm_of,
    train,
    working_weights,
)

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = OFFLOAD | {"offload_param": {"device": "cpu"}}
HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}}
CASES = {f"zero{s}-{p}": Case(stage=s, precision=p) for s in (0, 1, 2, 3) for p in ("fp32", "bf16", "fp16")}
CASES |= {
    "zero0-bf16-fused": Case(stage=0, precision="bf16", fused=True),
    "zero0-fp16-fused-groups": Case(stage=0, precision="fp16", fused=True, groups=2),
    "zero1-bf16-fp32-accumulation": Case(
        stage=1, precision="bf16", groups=2, deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
    "zero2-bf16-round-robin": Case(
        stage=2, precision="bf16", groups=2, deepspeed={"zero_optimization": {"round_robin_gradients": True}}
    ),
    "zero3-bf16-no-persistent": Case(
        stage=3, precision="bf16", deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    ),
    "zero3-fp32-sub-groups": Case(stage=3, deepspeed={"zero_optimization": {"sub_group_size": 20}}),
    "zero1-fp32-offload": Case(stage=1, deepspeed={"zero_optimization": OFFLOAD}),
    "zero2-bf16-offload": Case(stage=2, precision="bf16", deepspeed={"zero_optimization": OFFLOAD}),
    "zero2-fp16-offload": Case(stage=2, precision="fp16", deepspeed={"zero_optimization": OFFLOAD}),
    "zero3-bf16-offload": Case(stage=3, precision="bf16", deepspeed={"zero_optimization": OFFLOAD}),
    "zero3-fp32-offload-all": Case(stage=3, deepspeed={"zero_optimization": OFFLOAD_ALL}),
    "zero3-fp16-offload-all": Case(stage=3, precision="fp16", deepspeed={"zero_optimization": OFFLOAD_ALL}),
    "zero3-bf16-hpz": Case(stage=3, precision="bf16", deepspeed=HPZ),
}
# DeepSpeed keeps masters in half precision where the optimizer's state is, too, or lies on the CPU in its own Adam.
BF16_MASTERS = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
HALF_MASTERS = {
    f"zero{stage}-bf16-masters": Case(stage=stage, precision="bf16", deepspeed=BF16_MASTERS) for stage in (1, 2, 3)
}
CASES |= HALF_MASTERS


def around_a_sync(case: Case) -> dict[str, Any]:
    with swarm_of(case, run_dir=None) as (swarm, engine):
        train(case, engine, range(2))
        result: dict[str, Any] = {"particle": swarm.particle, "before": master_pieces(swarm)}
        engine(particle_batch(0, 98)[0].to(case.dtype))  # at hpZ it leaves copies of the weights behind
        swarm.sync()
        result |= {"after": master_pieces(swarm), "working": working_weights(engine)}
        engine.eval()
        x, _ = particle_batch(0, 99)
        result["output"] = engine(x.to(case.dtype)).detach().float().numpy()
        engine.train()
        result["losses"] = train(case, engine, range(2, 4))
        return result


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: torch.from_numpy(value).to(dtype).float().numpy() for name, value in weights.items()}


def forward(case: Case, weights: Weights) -> np.ndarray:
    model = Net()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    x, _ = particle_batch(0, 99)
    return model.to(case.dtype).eval()(x.to(case.dtype)).detach().float().numpy()


@pytest.mark.parametrize("name", slow_but([*list(CASES)[1::8], "zero3-bf16-hpz", "zero2-bf16-masters"], CASES))
def test_working_weights_are_the_cast_of_the_masters(pool: Pool, name: str) -> None:
    case = CASES[name].__class__(**{**vars(CASES[name]), "interval": 100})
    ranks = pool.run(around_a_sync, case)
    like = ranks[0]["working"]
    before = [assemble([rank["before"] for rank in ranks[start : start + 2]], like) for start in (0, 2)]
    mean = {key: (before[0][key] + before[1][key]) / 2 for key in like}
    assert any((before[0][key] != before[1][key]).any() for key in like), "the particles never went apart"
    for start in (0, 2):
        masters = assemble([rank["after"] for rank in ranks[start : start + 2]], like)
        if name in HALF_MASTERS:
            assert_equal(masters, cast(mean, torch.bfloat16))
        else:
            assert_close(masters, mean, rtol=1e-6, atol=1e-7)
        for rank in ranks[start : start + 2]:
            assert_equal(rank["working"], cast(masters, case.dtype))
            np.testing.assert_array_equal(rank["output"], forward(case, rank["working"]))
            assert np.isfinite(rank["losses"]).all()
