"""The parts of a DeepSpeed engine that ds_pso uses, and why an engine may not be trained in a swarm.

The facts about each feature were measured on DeepSpeed 0.19.8; see docs/zero.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ds_pso.shards.experts import why_not_whole
from ds_pso.shards.partial_offload import second_optimizer


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
    skipped_steps: int  # of ``global_steps``, those whose gradients were not finite
    seq_data_parallel_group: dist.ProcessGroup  # over which ZeRO divides the optimizer, and gradients are reduced
    seq_dp_world_size: int
    sequence_parallel_size: int
    mp_world_size: int  # of a group with tensor parallelism
    has_moe_layers: bool
    zenflow: object
    num_stages: int  # of a pipeline engine

    # Attributes rather than methods: they are replaced on one engine.
    backward: Callable[..., object]
    step: Callable[..., object]
    _copy_recovery_script: Callable[[str], None]
    _get_all_ckpt_names: Callable[..., list[str]]

    def train(self, mode: bool = True) -> object: ...
    def eval(self) -> object: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_elastic_checkpoint(self) -> bool: ...
    def bfloat16_enabled(self) -> bool: ...
    def is_deepcompile_enabled(self) -> bool: ...
    def autotp_size(self) -> int: ...
    def get_sequence_parallel_group(self) -> dist.ProcessGroup: ...
    def gradient_accumulation_steps(self) -> int: ...
    def gradient_clipping(self) -> float: ...
    def train_batch_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def save_checkpoint(self, save_dir: str, tag: str | None = None, *, save_latest: bool = True) -> object: ...
    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, *, load_module_strict: bool = True
    ) -> tuple[str | None, object]: ...


def is_pipeline(engine: object) -> bool:
    """Return true if the engine trains a ``PipelineModule``, with ``train_batch``."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return isinstance(engine, PipelineEngine)


def num_stages(engine: Engine) -> int:
    """Return the number of pipeline stages among which a particle's ranks are divided; 1 without a pipeline."""
    return int(engine.num_stages) if is_pipeline(engine) else 1


def why_unsupported(engine: Engine) -> str | None:
    """The feature of the engine whose shards cannot be read or published, with a remedy; None if there is none."""
    from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine

    zero = engine._config.zero_config
    offload_optimizer = zero.offload_optimizer
    checks = [
        (isinstance(engine, DualPipeVEngine), "each rank of DualPipeV has two stages; use PipelineModule"),
        (
            is_pipeline(engine) and engine.zero_optimization_stage() == 0 and engine.bfloat16_enabled(),
            "DeepSpeed cannot load what it saves of a pipeline in bf16 at ZeRO 0; set zero_optimization.stage to 1",
        ),
        (
            bool(getattr(engine._config.expert_parallel_config, "enabled", False)),
            "AutoEP makes one tensor of a rank's experts, of which other ranks hold the rest under the same name; set "
            "expert_parallel.enabled to false, or build the model with deepspeed.moe.layer.MoE",
        ),
        *_parallelism_checks(engine),
        (
            _swaps_frozen(engine.module),
            "parameters that are not trained are on NVMe, where nobody compares or copies them; set "
            'offload_param.device to "cpu"',
        ),
        (
            bool(getattr(offload_optimizer, "super_offload", False)),
            "SuperOffload updates shards in another process; remove offload_optimizer.super_offload",
        ),
        (
            bool(engine.zenflow),
            "with ZenFlow the masters lag behind the weights that are trained; remove zero_optimization.zenflow",
        ),
        (
            bool(zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights),
            "quantised ZeRO weights are not published; remove zero_quantized_weights",
        ),
        (
            engine.is_deepcompile_enabled() and engine.zero_optimization_stage() == 3,
            "DeepCompile keeps its own copies of ZeRO 3 parameters; remove compile.deepcompile",
        ),
    ]
    return next((reason for wrong, reason in checks if wrong), None) or why_not_whole(
        engine.module, engine.zero_optimization_stage()
    )


def _parallelism_checks(engine: Engine) -> list[tuple[bool, str]]:
    """Return what is wrong with the groups of ranks that share their samples, as in ``why_unsupported``."""
    size, ranks = dist.get_world_size(), dist.get_process_group_ranks(engine.seq_data_parallel_group)
    if is_pipeline(engine):
        return [
            (
                len(ranks) * num_stages(engine) != size,
                f"its data-parallel world has {len(ranks)} of the particle's {size} ranks (tensor or sequence "
                "parallelism beside a pipeline); use a pipeline alone inside a particle",
            ),
            (
                engine.has_moe_layers,
                "it is a pipeline with mixture-of-experts layers, which has not been tried; use a dense model",
            ),
        ]
    sequence, tensor = engine.sequence_parallel_size, tensor_parallel_size(engine)
    return [
        (
            sequence > 1 and len(ranks) != size,
            "its gradients are reduced over one rank of each sequence (mesh_param, or data_parallel_size in the "
            "config), so that the others' weights drift away; give deepspeed.initialize "
            "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp instead",
        ),
        (
            sequence > 1 and not _are_neighbours(engine.get_sequence_parallel_group()),
            "the ranks that have the parts of a sequence are not neighbours; give deepspeed.initialize an mpu in which "
            "they are, as in deepspeed.runtime.sequence_parallel.parallel_state_sp",
        ),
        (
            tensor > 1 and engine.autotp_size() != tensor,
            f"its layers are split over {tensor} ranks by an mpu of its own, and nobody else knows how; use "
            "tensor_parallel.autotp_size instead",
        ),
        (
            tensor > 1 and sequence > 1,
            "its layers and its sequences are split over ranks; remove tensor_parallel or sequence_parallel_size",
        ),
        (
            sequence * tensor > 1 and engine.has_moe_layers,
            "it has mixture-of-experts layers, and its layers or sequences are split over ranks, which has not been "
            "tried together; remove tensor_parallel or sequence_parallel_size",
        ),
        (
            len(ranks) != size // tensor,
            f"its gradients are reduced over {len(ranks)} of the particle's {size} ranks (an mpu of its own); use "
            "sequence_parallel_size, tensor_parallel.autotp_size, or data parallelism alone inside a particle",
        ),
    ]


def _are_neighbours(group: dist.ProcessGroup) -> bool:
    """Return true if a group of n ranks begins at a multiple of n, and has no gaps: so data are shared out."""
    ranks = dist.get_process_group_ranks(group)
    return ranks[0] % len(ranks) == 0 and ranks == list(range(ranks[0], ranks[0] + len(ranks)))


def tensor_parallel_size(engine: Engine) -> int:
    """Return over how many ranks layers are split; 1 of a pipeline, for whose stages DeepSpeed has the same word."""
    return 1 if is_pipeline(engine) else int(engine.mp_world_size)


def ranks_per_sample(engine: Engine) -> int:
    """Return the number of ranks of a particle that compute on the same samples together."""
    return num_stages(engine) if is_pipeline(engine) else engine.sequence_parallel_size * tensor_parallel_size(engine)


def _swaps_frozen(module: torch.nn.Module) -> bool:
    """Return true if ZeRO 3 has a parameter that is not trained on NVMe, and not in memory."""
    frozen = [getattr(p, "ds_tensor", None) for p in module.parameters() if not p.requires_grad]
    places = [getattr(tensor, "final_location", None) for tensor in frozen]
    return any(getattr(place, "value", place) == "nvme" for place in places)


def cautions(engine: Engine) -> list[str]:
    """Return what is allowed, and hardly ever meant, each with a remedy."""
    found = []
    if uses_muon(engine) and engine.gradient_clipping() > 0 and engine.zero_optimization_stage() > 0:
        found.append(
            f"gradient_clipping = {engine.gradient_clipping():g}: with Muon at ZeRO 1 to 3 DeepSpeed clips the update "
            "that Newton-Schulz has made, whose norm says nothing of the gradients, so that steps are far shorter than "
            "the learning rate says; set it to 0"
        )
    second = second_optimizer(engine.optimizer)
    if second is not None and engine.lr_scheduler is not None:
        found.append(
            "offload_optimizer.ratio: DeepSpeed does not pass the learning-rate schedule on to the sub-groups that are "
            "not offloaded, of the first parameter group; leave the scheduler out, or set ratio to 1"
        )
    return found


def uses_muon(engine: Engine) -> bool:
    """Return true if DeepSpeed's Muon trains the matrices."""
    return any(group.get("use_muon") for group in engine.basic_optimizer.param_groups)
