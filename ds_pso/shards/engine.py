"""The parts of a DeepSpeed engine that ds_pso uses, and why an engine may not be trained in a swarm.

The facts about each feature were measured on DeepSpeed 0.19.8; see docs/zero.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_pso.shards.experts import why_not_whole


class CheckpointEngine(Protocol):
    """The object through which a DeepSpeed engine writes and reads its files."""

    def create(self, info: object) -> None: ...
    def save(self, state_dict: object, path: str) -> object: ...
    def load(self, path: str, map_location: object = None) -> object: ...
    def commit(self, info: object) -> bool: ...
    def is_decoupled(self) -> bool: ...


class Monitor(Protocol):
    """DeepSpeed's writer of events for TensorBoard and the like."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


class LRScheduler(Protocol):
    """A learning-rate schedule of DeepSpeed's, of torch's or of the user's."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Engine(Protocol):
    """A ``deepspeed.DeepSpeedEngine``, which has no types of its own."""

    module: torch.nn.Module
    optimizer: Any  # of one of DeepSpeed's classes, or torch's; a layout says what it uses of it
    basic_optimizer: torch.optim.Optimizer  # the one inside ``optimizer``, or itself
    lr_scheduler: LRScheduler | None
    monitor: Monitor
    checkpoint_engine: CheckpointEngine
    config: object  # what ``deepspeed.initialize`` was given: a dict or a path
    _config: Any  # parsed
    device: torch.device
    global_steps: int
    global_samples: int
    data_parallel_group: dist.ProcessGroup
    dp_world_size: int
    seq_dp_world_size: int
    zenflow: object

    # Attributes rather than methods: they are replaced on one engine.
    backward: Callable[..., object]
    step: Callable[..., object]
    _copy_recovery_script: Callable[[str], None]
    _get_all_ckpt_names: Callable[..., list[str]]

    def train(self, mode: bool = True) -> object: ...
    def eval(self) -> object: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_elastic_checkpoint(self) -> bool: ...
    def is_deepcompile_enabled(self) -> bool: ...
    def gradient_accumulation_steps(self) -> int: ...
    def gradient_clipping(self) -> float: ...
    def train_batch_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def save_checkpoint(self, save_dir: str, tag: str | None = None, *, save_latest: bool = True) -> object: ...
    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, *, load_module_strict: bool = True
    ) -> tuple[str | None, object]: ...


def why_unsupported(engine: Engine) -> str | None:
    """The feature of the engine whose shards cannot be read or published, with a remedy; None if there is none."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    zero = engine._config.zero_config
    offload_optimizer, offload_param = zero.offload_optimizer, zero.offload_param
    devices = [str(getattr(c.device, "value", c.device)) for c in (offload_optimizer, offload_param) if c]
    master_dtype = getattr(engine.optimizer, "master_weights_and_grads_dtype", torch.float32)
    checks = [
        (isinstance(engine, PipelineEngine), "it is a pipeline engine, which has no engine.step(); use ZeRO"),
        (
            bool(getattr(engine._config.expert_parallel_config, "enabled", False)),
            "AutoEP makes one tensor of a rank's experts, of which other ranks hold the rest under the same name; set "
            "expert_parallel.enabled to false, or build the model with deepspeed.moe.layer.MoE",
        ),
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
            f"its master weights are {master_dtype}, and sync points need fp32; remove *_master_weights_and_grads",
        ),
    ]
    return next((reason for wrong, reason in checks if wrong), None) or why_not_whole(
        engine.module, engine.zero_optimization_stage()
    )


def cautions(engine: Engine) -> list[str]:
    """Return what is allowed, and hardly ever meant, each with a remedy."""
    found = []
    if uses_muon(engine) and engine.gradient_clipping() > 0 and engine.zero_optimization_stage() > 0:
        found.append(
            f"gradient_clipping = {engine.gradient_clipping():g}: with Muon at ZeRO 1 to 3 DeepSpeed clips the update "
            "that Newton-Schulz has made, whose norm says nothing of the gradients, so that steps are far shorter than "
            "the learning rate says; set it to 0"
        )
    return found


def uses_muon(engine: Engine) -> bool:
    """Return true if DeepSpeed's Muon trains the matrices."""
    return any(group.get("use_muon") for group in engine.basic_optimizer.param_groups)
