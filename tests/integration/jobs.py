"""A small training job that every distributed test shares: model, data, config, loop, what it returns.

Functions here run on the ranks, except where they say otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_pso
from ds_pso.swarm import Swarm

ROWS = 8  # that a particle sees in one optimizer step, whatever its number of ranks
CLEAN = -1  # index of a particle that there is not, whose data is free of noise
Weights = dict[str, np.ndarray]
Spoil = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One job. The defaults are the simplest: ZeRO 2, fp32, local SGD, two particles."""

    stage: int = 2
    precision: str = "fp32"
    sync_mode: str = "local_sgd"
    options: dict[str, Any] = field(default_factory=dict)  # of the rule
    particles: int | str = 2
    interval: int = 2
    steps: int = 4
    optimizer: str = "AdamW"
    lr: float = 0.02
    momentum: float = 0.0  # of SGD
    accumulate: int = 1  # micro-batches per optimizer step
    batch_norm: bool = False
    dropout: float = 0.0
    groups: int = 1  # parameter groups
    layers: int = 0  # alike, in the middle of the model
    fused: bool = False  # stage 0 in half precision: DeepSpeed's wrapper for fused optimizers
    seed: int | None = None  # of the initial weights; None: each rank its own
    probe: bool = False  # give attach a probe
    deepspeed: dict[str, Any] = field(default_factory=dict)  # more of DeepSpeed's config
    swarm: dict[str, Any] = field(default_factory=dict)  # more of the swarm section

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.precision}-{self.sync_mode}"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


class Net(nn.Module):
    """69 parameters in tensors of odd sizes, one of them smaller than a particle of two ranks; 30 more a layer."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0, layers: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(layers))
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.LayerNorm(5)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(self.dropout(torch.tanh(self.norm(x)))) * self.scale


def build_model(case: Case) -> Net:
    torch.manual_seed(launched_rank() + 100 if case.seed is None else case.seed)
    return Net(case.batch_norm, case.dropout, case.layers)


def parameter_groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[i :: case.groups]} for i in range(case.groups)]


def particle_batch(particle: int, step: int) -> tuple[Tensor, Tensor]:
    """What particle ``particle`` learns from at ``step``: inputs (8, 7) and targets (8, 3)."""
    generator = torch.Generator().manual_seed(1000 * particle + step)
    x = torch.randn(ROWS, 7, generator=generator)
    # Particles differ in noise, so that one is clearly better than another.
    noise = 0.3 * (particle + 1) * torch.randn(ROWS, 3, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.mean(1)], 1) + noise


def rank_batches(case: Case, particle: int, rank: int, size: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of one rank: equal parts of what its particle sees."""
    rows = ROWS // size // case.accumulate
    x, y = particle_batch(particle, step)
    for part in range(case.accumulate):
        begin = (part * size + rank) * rows
        yield x[begin : begin + rows], y[begin : begin + rows]


def launched_rank() -> int:
    """The rank in the launcher's world, also inside a particle: its number on the machine, unless ranks share a GPU."""
    return int(os.environ.get("LAUNCHED_RANK") or os.environ["LOCAL_RANK"])


def place(case: Case) -> tuple[int, int, int]:
    """(particle, rank in it, its size) as the config's number of particles divides the launcher's world."""
    rank, world_size = launched_rank(), int(os.environ["LAUNCHED_WORLD_SIZE"])
    size = world_size // int(case.particles)
    return rank // size, rank % size, size


def config(case: Case, particle_size: int) -> dict[str, Any]:
    optimizer: dict[str, Any] = {"type": case.optimizer, "params": {"lr": case.lr}}
    if case.optimizer in ("AdamW", "Muon"):
        optimizer["params"]["torch_adam"] = True  # Muon's Adam, too: DeepSpeed's own would have to be compiled
    if case.momentum:
        optimizer["params"]["momentum"] = case.momentum
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // particle_size // case.accumulate,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "optimizer": optimizer,
        "zero_optimization": {"stage": case.stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if case.precision != "fp32":
        result[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        result["fp16"] |= {"initial_scale_power": 4, "hysteresis": 1}
    if case.optimizer == "Muon":
        result["zero_optimization"]["reduce_scatter"] = False  # at ZeRO 3 DeepSpeed refuses it
    for key, value in case.deepspeed.items():
        result[key] = {**result[key], **value} if isinstance(value, dict) and key in result else value
    result["swarm"] = {
        "particles": case.particles,
        "sync_mode": case.sync_mode,
        "sync_interval": case.interval,
        "timeout_s": 20,
        **case.swarm,
    }
    options = {"outer_lr": 0.7, "outer_momentum": 0.6} if case.sync_mode == "diloco" else {}  # those of the oracle
    if case.options or options:
        result["swarm"][case.sync_mode] = {**options, **case.options}
    return result


def build_engine(case: Case, ds_config: dict[str, Any], model: nn.Module | None = None) -> Any:
    model = build_model(case) if model is None else model  # a compiled one may have no truth value
    gc.freeze()  # DeepSpeed collects garbage at ZeRO 3, and would look at all that was ever imported
    if case.precision == "fp16":
        # DeepSpeed asks whether the CPU is fast at it; slow is good enough here.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    if case.optimizer == "Muon":
        torch.compiler.set_stance("force_eager")  # it would compile for half a minute
    if case.fused:
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW  # the real one needs a compiler and a GPU
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(case, model), config=ds_config)
    return engine


def loss_of(case: Case, engine: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(engine(x.to(engine.device, case.dtype)).float(), y.to(engine.device))


def probe_of(case: Case, engine: Any) -> Callable[[int], Tensor]:
    """Loss on what nobody trains on, free of noise; each rank of a particle sees its own part of the batch."""

    def probe(index: int) -> Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        ((x, y),) = rank_batches(replace(case, accumulate=1), CLEAN, rank, size, index)
        engine.eval()
        loss = loss_of(case, engine, x, y)
        engine.train()
        return loss

    return probe


@contextlib.contextmanager
def swarm_of(case: Case, *, attach: bool = True, **init: Any) -> Iterator[tuple[Swarm, Any]]:
    """A swarm with its engine."""
    with ds_pso.init(config(case, place(case)[2]), **init) as swarm:
        engine = build_engine(case, swarm.ds_config)
        if attach:
            swarm.attach(engine, probe=probe_of(case, engine) if case.probe else None)
        yield swarm, engine


def one_after_the_other(cases: Iterable[Case], **init: Any) -> Iterator[tuple[Case, Swarm, Any]]:
    """Swarms of one launch, each begun in the world of the one before."""
    world = None
    for case in cases:
        swarm = ds_pso.init(config(case, place(case)[2]), world=world, **init)
        world = swarm.world
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine, probe=probe_of(case, engine) if case.probe else None)
        yield case, swarm, engine
    if world is not None:
        world.close()


def train(
    case: Case,
    engine: Any,
    steps: range | None = None,
    spoil: Spoil | None = None,
    where: tuple[int, int, int] | None = None,
) -> list[float]:
    """Optimizer steps; returns the losses of this rank.

    Data follows the particles that the config names, also where ``allreduce`` makes them one; or ``where``, as from
    ``place``. ``spoil(step, loss)`` may replace a loss.
    """
    particle, rank, size = where or place(case)
    losses = []
    for step in range(case.steps) if steps is None else steps:
        for x, y in rank_batches(case, particle, rank, size, step):
            loss = loss_of(case, engine, x, y)
            if spoil is not None:
                loss = spoil(step, loss)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


# -- what a rank reports ----------------------------------------------------------------------


def working_weights(engine: Any) -> Weights:
    """The weights that the forward pass uses, in their own precision, and the buffers; ZeRO 3 gathers them."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        gather = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if gather else contextlib.nullcontext():
            found[name] = parameter.detach().float().cpu().numpy().copy()
    buffers = {name: buffer.detach().float().cpu().numpy().copy() for name, buffer in engine.module.named_buffers()}
    return found | buffers


def master_pieces(swarm: Swarm) -> list[tuple[str, int, np.ndarray]]:
    """This rank's part of the fp32 masters: (parameter, offset in it, values)."""
    shards = swarm.session.synchronizer.parts.shards
    tensors = shards.tensors
    return [
        (s.name, s.param_start, tensors[s.shard][s.shard_start : s.shard_start + s.numel].cpu().numpy().copy())
        for s in shards.segments
    ]


def optimizer_state(engine: Any) -> dict[str, np.ndarray]:
    """The moments of this rank, in the optimizer's own order."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return {
        f"{i}.{key}": torch.as_tensor(value).detach().float().cpu().numpy().copy()
        for i, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


# -- for the test itself ----------------------------------------------------------------------


def assemble(pieces: list[list[tuple[str, int, np.ndarray]]], like: Weights) -> Weights:
    """The whole model from the pieces of the ranks of a particle; every element must be there once."""
    whole = {name: np.full(value.size, np.nan, np.float32) for name, value in like.items()}
    for name, start, values in (piece for rank in pieces for piece in rank):
        assert np.isnan(whole[name][start : start + values.size]).all(), f"{name}: an element has two owners"
        whole[name][start : start + values.size] = values
    return {name: value.reshape(like[name].shape) for name, value in whole.items() if not np.isnan(value).all()}


def assert_equal(actual: Weights, expected: Weights) -> None:
    """Bit for bit (and NaN equals NaN)."""
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def assert_close(actual: Weights, expected: Weights, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """To fp32 rounding."""
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, atol=atol, err_msg=name)
