"""Finds the shards of a DeepSpeed engine, or says why it cannot.

The facts about each optimizer class were measured on DeepSpeed 0.19.8; see docs/zero.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_pso.errors import UnsupportedError
from ds_pso.shards.base import Segment, Shards, replace
from ds_pso.shards.replicated import FlatMasterShards, ReplicatedShards, SplitMasterShards
from ds_pso.shards.zero3 import Zero3Shards
from ds_pso.shards.zero12 import BF16Shards, Zero12Shards

__all__ = ["Segment", "Shards", "find_shards", "replace"]

# In order: the first class that the optimizer is an instance of decides.
_LAYOUTS: list[tuple[type, type[Shards]]] = [
    (DeepSpeedZeroOptimizer_Stage3, Zero3Shards),
    (DeepSpeedZeroOptimizer, Zero12Shards),
    (BF16_Optimizer, BF16Shards),
    (FP16_Optimizer, FlatMasterShards),
    (FP16_UnfusedOptimizer, SplitMasterShards),
    (torch.optim.Optimizer, ReplicatedShards),
]


def find_shards(engine: Any) -> Shards:
    """The master shards of this rank.

    Raises:
        UnsupportedError: the engine uses a feature whose shards cannot be read or published.
    """
    reason = _why_not(engine)
    if reason:
        raise UnsupportedError(f"ds_pso cannot swarm this engine: {reason}")
    for optimizer_class, layout in _LAYOUTS:
        if isinstance(engine.optimizer, optimizer_class):
            return layout(engine)
    raise UnsupportedError(
        f"ds_pso does not know the optimizer class {type(engine.optimizer).__name__}; "
        "use ZeRO stage 0 to 3 with a torch or DeepSpeed optimizer"
    )


def _why_not(engine: Any) -> str | None:
    zero = engine._config.zero_config
    offload_optimizer, offload_param = zero.offload_optimizer, zero.offload_param
    devices = [str(getattr(c.device, "value", c.device)) for c in (offload_optimizer, offload_param) if c]
    master_dtype = getattr(engine.optimizer, "master_weights_and_grads_dtype", torch.float32)
    checks = [
        (isinstance(engine, PipelineEngine), "it is a pipeline engine, which has no engine.step(); use ZeRO"),
        (engine.has_moe_layers, "it has mixture-of-experts layers, whose shards are not aligned; use a dense model"),
        (
            engine.dp_world_size != dist.get_world_size(),
            f"its data-parallel world has {engine.dp_world_size} of the particle's {dist.get_world_size()} ranks "
            "(tensor, sequence or pipeline parallelism); use data parallelism alone inside a particle",
        ),
        ("nvme" in devices, 'its shards are on NVMe; set offload_optimizer.device and offload_param.device to "cpu"'),
        (
            getattr(offload_optimizer, "ratio", 1.0) != 1.0,
            "a part of its optimizer runs on the GPU and the rest on the CPU; set offload_optimizer.ratio to 1",
        ),
        (
            bool(getattr(offload_optimizer, "super_offload", False)),
            "SuperOffload updates shards in another process; remove offload_optimizer.super_offload",
        ),
        (bool(engine.zenflow), "ZenFlow updates shards asynchronously; remove zero_optimization.zenflow"),
        (
            bool(zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights),
            "quantised ZeRO weights are not published; remove zero_quantized_weights",
        ),
        (
            engine.is_deepcompile_enabled() and engine.zero_optimization_stage() == 3,
            "DeepCompile keeps its own copies of ZeRO 3 parameters; remove compile.deepcompile",
        ),
        (
            master_dtype != torch.float32,
            f"its master weights are {master_dtype}, and averages need fp32; remove *_master_weights_and_grads",
        ),
    ]
    return next((reason for wrong, reason in checks if wrong), None)
