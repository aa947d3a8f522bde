"""Checks that train a small model on the device, and compare with NumPy, with torch on the CPU, or bit for bit.

Each function is called on every rank of a launch with a folder that the ranks share, and returns what it found.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from integration.jobs import (
    Case,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    build_engine,
    config,
    master_pieces,
    one_after_the_other,
    optimizer_state,
    train,
    working_weights,
)
from integration.oracle import train_particles
from torch import nn

import ds_pso
from ds_pso.comm.compression import FORMATS, find_format
from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.peer_group import connect_peers
from ds_pso.distributed.world import World
from ds_pso.swarm import Swarm
from ds_pso.utils.background_task import Background
from ds_pso.utils.checksums import Copied
from gpu.table import NotTried

# On a CPU its build takes minutes, and a file lock that a killed rank never gives back; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
STAGES = (0, 1, 2, 3)
NEVER = 100  # an interval beyond the last step
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
OFFLOAD_ALL = OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": True}}
SWARM = {
    "inertia": 0.3,
    "guard": True,
    "fitness_steps": 2,
    "temperature": 0.03,
    "unequal_above": 0.1,
    "lr_spread": 2.0,
    "lr_step": 1.3,
}
RULES = [
    Case(),
    Case(sync_mode="diloco", steps=6),
    Case(sync_mode="easgd", steps=6, stage=0),
    Case(sync_mode="pso", steps=6, stage=3, options={"inertia": 0.4, "cognitive": 0.6, "social": 0.8}),
    Case(sync_mode="swarm", steps=6, probe=True, options=SWARM),
    Case(sync_mode="local_sgd", steps=6, interval=3, stage=1, swarm={"delay": 1}),
]


# -- what several checks need -----------------------------------------------------------------


def over_gloo(case: Case) -> Case:
    """Return the case with peers that may share a GPU, which NCCL refuses."""
    return replace(case, swarm={"peer_backend": "gloo", **case.swarm})


def each(cases: Iterable[Case]) -> Iterator[tuple[Case, Swarm, Any]]:
    """Yield one swarm after the other, its engine on the device."""
    for case, swarm, engine in one_after_the_other(map(over_gloo, cases)):
        assert engine.device.type == DEVICE.type, f"the engine is on {engine.device}"
        yield case, swarm, engine
        gc.collect()


def bits(weights: Weights) -> str:
    """Return a hash of all bits."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return total.hexdigest()[:16]


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """Return the weights as ``dtype`` holds them."""
    return {name: torch.from_numpy(value).to(dtype).float().numpy() for name, value in weights.items()}


def assert_alike(swarm: Swarm, value: object, what: str) -> None:
    """Compare a JSON value over all ranks."""
    everyone = swarm.world.gather(what, value)
    assert all(other == everyone[0] for other in everyone), f"{what}: not alike on all ranks: {everyone}"


def masters(swarm: Swarm, like: Weights) -> list[Weights]:
    """Return the fp32 masters of every particle, whole."""
    mine = [(name, start, values.tolist()) for name, start, values in master_pieces(swarm)]
    everyone = swarm.world.gather("masters", mine)
    pieces = [[(name, start, np.array(values, np.float32)) for name, start, values in rank] for rank in everyone]
    size = swarm.world.layout.particle_size
    return [assemble(pieces[first : first + size], like) for first in range(0, len(pieces), size)]


def check_a_sync(case: Case, swarm: Swarm, engine: Any) -> None:
    """Train apart, sync, and compare: masters with their mean, working weights with the cast of the masters."""
    train(case, engine, range(2))
    like = working_weights(engine)
    before = masters(swarm, like)
    swarm.sync()
    after = masters(swarm, like)
    mean = {key: np.mean([weights[key] for weights in before], axis=0) for key in like}
    assert any((before[0][key] != before[1][key]).any() for key in like), "the particles never went apart"
    for weights in after:
        assert_close(weights, mean, rtol=1e-6, atol=1e-7)
    assert_equal(working_weights(engine), cast(after[swarm.particle], case.dtype))
    assert np.isfinite(train(case, engine, range(2, 4))).all(), "a loss after the sync is not finite"


def check_syncs(cases: Sequence[Case]) -> str:
    """``check_a_sync`` of each, and the optimizers that DeepSpeed has made of them."""
    found = []
    for case, swarm, engine in each(replace(case, interval=NEVER) for case in cases):
        try:
            check_a_sync(case, swarm, engine)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        found.append(type(engine.optimizer).__name__)
    return f"{len(cases)} engines: {', '.join(dict.fromkeys(found))}"


def needs_gpus(number: int) -> None:
    """Raise NotTried where there are fewer."""
    if torch.cuda.device_count() < number:
        raise NotTried(f"needs {number} GPUs, and there are {torch.cuda.device_count()}")


# -- the checks -------------------------------------------------------------------------------


def rules(folder: Path) -> str:
    worst, inside = 0.0, ""
    for case, swarm, engine in each(RULES):
        inside = dist.get_backend_config()
        train(case, engine)
        truth, found = train_particles(case)[swarm.particle], working_weights(engine)
        # The device adds in another order, and Adam makes a step of even the smallest gradient.
        assert_close(found, truth, rtol=1e-4, atol=1e-4)
        worst = max(worst, *(float(np.abs(found[name] - truth[name]).max()) for name in truth))
    assert not ON_GPU or "nccl" in inside
    return f"{len(RULES)} trainings, at most {worst:.0e} from NumPy's weights; {inside} inside, gloo between"


def fp32(folder: Path) -> str:
    small_groups = {"zero_optimization": {"sub_group_size": 20, "stage3_param_persistence_threshold": 0}}
    return check_syncs([*(Case(stage=stage) for stage in STAGES), Case(stage=3, deepspeed=small_groups)])


def bf16(folder: Path) -> str:
    return check_syncs(
        [
            *(Case(stage=stage, precision="bf16") for stage in STAGES),
            Case(stage=1, precision="bf16", groups=2, deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
            Case(stage=0, precision="bf16", fused=True),
        ]
    )


def fp16(folder: Path) -> str:
    return check_syncs(
        [*(Case(stage=stage, precision="fp16") for stage in STAGES), Case(stage=0, precision="fp16", fused=True)]
    )


def loss_scaling(folder: Path) -> str:
    scale = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
    base = Case(precision="fp16", steps=12, deepspeed=scale)
    skipped = []
    # At ZeRO 0 DeepSpeed 0.19.8 does not multiply the loss by the scale, so that nothing overflows.
    for case, swarm, engine in each(replace(base, stage=stage) for stage in (1, 2, 3)):
        train(case, engine)
        skipped.append(engine.skipped_steps)
        assert 0 < engine.skipped_steps < case.steps, f"{case}: {engine.skipped_steps} steps were skipped"
        weights = working_weights(engine)
        assert all(np.isfinite(value).all() for value in weights.values()), f"{case}: not finite"
        assert_alike(swarm, bits(weights), "weights")
    return f"steps skipped of 12 at ZeRO 1 to 3: {', '.join(map(str, skipped))}"


def nccl(folder: Path) -> str:
    backend = "nccl" if ON_GPU else "gloo"
    peers = connect_peers(backend, dist.HashStore(), 0, 1, 30.0)
    world: Any = SimpleNamespace(
        layout=Layout(0, 1, 1),
        peers=peers,
        coordinator=SimpleNamespace(timeout_s=30.0, describe=lambda rank: f"rank {rank}"),
        background=Background(),
    )
    exchange = Exchange(world, bucket_mb=0.001, checksums=True)
    x = torch.randn(1000, device=peers.device)
    for tensor in (x, x.double(), x.view(torch.uint8)):
        if tensor.dtype != torch.uint8:
            for piece, received in exchange.weighted_mean([tensor], [1.0]):
                assert torch.equal(received, piece.of(tensor))
        for piece, received in exchange.from_one([tensor], 0):
            assert torch.equal(received, piece.of(tensor))
        (row,) = exchange._gather(tensor)
        arrived = torch.empty_like(tensor)
        sizes = [tensor.numel()]
        exchange._all_to_all(arrived, tensor, sizes, sizes, lambda t=tensor, a=arrived: Copied([t], [a]))
        assert torch.equal(row, tensor)
        assert torch.equal(arrived, tensor)
    peers.shut()
    return f"{backend}: all-reduce, broadcast, all-gather and all-to-all of fp32, fp64, bytes and their checksums"


class Deep(nn.Module):
    """Square layers: enough work for a device that streams overlap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def train_deep(case: Case, world: World | None, *, inline: bool) -> tuple[Swarm, str]:
    """Train; return the swarm, whose world the next one takes, and a hash of the weights.

    Args:
        inline: exchange before training goes on, on its own stream.
    """
    width, rows = (2048, 512) if ON_GPU else (32, 8)
    torch.manual_seed(0)
    swarm = ds_pso.init(config(case, 1), world=world)
    swarm.world.background._inline = inline
    engine = build_engine(case, swarm.ds_config, Deep(width))
    swarm.attach(engine)
    data = torch.Generator(engine.device).manual_seed(swarm.particle)
    for _ in range(case.steps):
        x = torch.randn(rows, width, generator=data, device=engine.device)
        engine.backward((engine(x.to(case.dtype)).float() - x.roll(1, 1)).square().mean())
        engine.step()
    swarm.finish_pending()
    found = bits(working_weights(engine))
    swarm.world.background._inline = False
    del engine
    return swarm, found


def background(folder: Path) -> str:
    host = {"delay": 2, "wire": "int4", "state_device": "cpu"}
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "delay": ("local_sgd", {"delay": 2}),
        "fragments": ("local_sgd", {"delay": 3, "fragments": 3}),
        "streaming": ("diloco", {"delay": 1, "fragments": 2, "streaming": True}),
        "int4, state on the host": ("diloco", host),
        "sparse": ("diloco", {"delay": 2, "wire": "sparse"}),
    }
    world = None
    for name, (mode, section) in sections.items():
        case = over_gloo(Case(sync_mode=mode, lr=1e-3, steps=11, interval=4, swarm=section))
        found = []
        for inline in (True, True, False):
            swarm, final = train_deep(case, world, inline=inline)
            world = swarm.world
            del swarm
            clean_up()
            found.append(final)
        if found[0] != found[1]:
            raise NotTried(f"{name}: two equal trainings end in different bits on this device")
        assert found[2] == found[0], f"{name}: beside training it ends in other bits than before it"
    return f"{len(sections)} kinds: {'; '.join(sections)}"


def clean_up() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def resume(folder: Path) -> str:
    cases = [
        Case(stage=2, precision="bf16", dropout=0.3, sync_mode="diloco"),
        Case(stage=3, dropout=0.3, swarm={"delay": 2, "wire": "int8"}, interval=3),
        Case(stage=1, precision="fp16", dropout=0.3),
        Case(stage=0, dropout=0.3, sync_mode="pso", options={"inertia": 0.3, "cognitive": 0.5}),
    ]
    whole: list[tuple[str, str, str]] = []
    for number, (case, swarm, engine) in enumerate(each([case for case in cases for _ in range(2)])):
        part, is_resumed = folder / f"checkpoint_{number // 2}", number % 2
        if not is_resumed:
            train(case, engine, range(4))
            swarm.save(part)
        else:
            for _ in range(1 + swarm.particle):  # somebody else's random numbers
                torch.rand(1, device=DEVICE)
                torch.rand(1)
            assert swarm.load(part) == 4
        losses = train(case, engine, range(4, 8))
        swarm.finish_pending()
        found = bits(working_weights(engine)), bits(optimizer_state(engine)), repr(losses)
        if not is_resumed:
            whole.append(found)
        else:
            assert found == whole[-1], f"{case}: resumed, it is another training"
    return f"{len(cases)} trainings"


def one_particle(folder: Path) -> str:
    cases = [
        Case(stage=stage, precision=precision, particles=1, interval=1, dropout=0.2, sync_mode="pso")
        for stage in STAGES
        for precision in ("fp32", "bf16")
    ]
    swarms = []
    for case, _, engine in each(cases):
        swarms.append((train(case, engine), bits(working_weights(engine)), bits(optimizer_state(engine))))
    for case, found in zip(cases, swarms, strict=True):
        ds_config = config(case, 1)
        del ds_config["swarm"]
        engine = build_engine(case, ds_config)
        plain = train(case, engine), bits(working_weights(engine)), bits(optimizer_state(engine))
        assert found == plain, f"{case}: not what plain DeepSpeed trains"
    return f"{len(cases)} engines"


def wires(folder: Path) -> str:
    torch.manual_seed(0)
    apart = {}
    for name in FORMATS:
        form = find_format(name)
        x = torch.randn(64 * 4096) * torch.logspace(-6, 2, 64).repeat_interleave(4096)
        y = x.to(DEVICE)
        here = torch.empty(form.nbytes(len(x)), dtype=torch.uint8)
        there = torch.empty(form.nbytes(len(x)), dtype=torch.uint8, device=DEVICE)
        form.encode(x, here)
        form.encode(y, there)
        values, received, crossed = torch.empty_like(x), torch.empty_like(y), torch.empty_like(x)
        form.decode(here, values)
        form.decode(there, received)
        form.decode(there.cpu(), crossed)
        torch.testing.assert_close(received.cpu(), crossed, rtol=1e-6, atol=0)
        apart[name] = float((values != received.cpu()).float().mean())
        assert apart[name] < 1e-3, f"{name}: {apart[name]:.1%} of the elements are encoded otherwise than on a CPU"
    for case, swarm, engine in each(Case(sync_mode="diloco", steps=6, swarm={"wire": wire}) for wire in FORMATS):
        losses = train(case, engine)
        assert np.isfinite(losses).all(), f"{case.swarm}: a loss is not finite"
        assert_alike(swarm, bits(working_weights(engine)), f"weights after {case.swarm['wire']}")
    rare = [f"{name} {share:.0e}" for name, share in apart.items() if share]
    return f"{', '.join(FORMATS)}; encoded otherwise than on a CPU: {', '.join(rare) or 'nothing'}"


def state_on_the_host(folder: Path) -> str:
    kinds = [
        Case(sync_mode="diloco", steps=8, swarm={"wire": "int4"}),
        Case(sync_mode="diloco", steps=8, swarm={"state_dtype": "bf16"}, stage=3),
        Case(sync_mode="pso", steps=8, options={"inertia": 0.4, "cognitive": 0.6}, stage=0),
    ]
    both = [case for kind in kinds for case in (kind, replace(kind, swarm={**kind.swarm, "state_device": "cpu"}))]
    found = []
    for case, swarm, engine in each(both):
        updater = swarm.session.synchronizer.parts.updater
        kept = [tensor for state in updater.state for tensor in state.values()]
        if updater.differences is not None:
            kept += [*updater.differences.common, *updater.differences.residual]
        where = "cpu" if "state_device" in case.swarm else DEVICE.type
        assert kept, f"{case}: no state"
        assert all(tensor.device.type == where for tensor in kept), f"{case}: state is not on {where}"
        assert where == DEVICE.type or all(t.is_pinned() for t in kept if t.numel()), f"{case}: state is not pinned"
        train(case, engine)
        found.append(bits(working_weights(engine)))
    for number, kind in enumerate(kinds):
        assert found[2 * number] == found[2 * number + 1], f"{kind}: other bits with state on the host"
    return f"{len(kinds)} trainings"


def cpu_offload(folder: Path) -> str:
    return check_syncs(
        [
            Case(stage=1, deepspeed={"zero_optimization": OFFLOAD}),
            Case(stage=2, precision="bf16", deepspeed={"zero_optimization": OFFLOAD}),
            Case(stage=2, precision="fp16", deepspeed={"zero_optimization": OFFLOAD}),
            Case(stage=3, precision="bf16", deepspeed={"zero_optimization": OFFLOAD}),
            Case(stage=3, deepspeed={"zero_optimization": OFFLOAD_ALL}),
            Case(stage=3, precision="fp16", deepspeed={"zero_optimization": OFFLOAD_ALL}),
        ]
    )


def muon(folder: Path) -> str:
    base = Case(optimizer="Muon", momentum=0.9, layers=2)
    return check_syncs([replace(base, stage=s) for s in (1, 2, 3)] + [replace(base, stage=2, precision="bf16")])


def fused_adam(folder: Path) -> str:
    from deepspeed.ops.op_builder import FusedAdamBuilder
    from torch.utils.cpp_extension import CUDA_HOME

    if not ON_GPU or CUDA_HOME is None or shutil.which("ninja") is None or not FusedAdamBuilder().is_compatible():
        raise NotTried("needs a GPU, nvcc and ninja")
    own = {"optimizer": {"params": {"lr": 0.02}}}  # without torch_adam
    return check_syncs(
        [Case(stage=stage, precision=p, deepspeed=own) for stage, p in ((0, "fp32"), (0, "bf16"), (2, "bf16"))]
    )


def cpu_adam(folder: Path) -> str:
    if not ON_GPU or shutil.which("ninja") is None or shutil.which("c++") is None:
        raise NotTried("needs a GPU, a C++ compiler and ninja")
    own = {"optimizer": {"params": {"lr": 0.02}}, "zero_force_ds_cpu_optimizer": True}
    return check_syncs(
        [Case(stage=stage, precision="bf16", deepspeed={**own, "zero_optimization": OFFLOAD}) for stage in (2, 3)]
    )


def nvme_offload(folder: Path) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not ON_GPU or shutil.which("c++") is None or not AsyncIOBuilder().is_compatible(verbose=False):
        raise NotTried("needs a GPU, a C++ compiler and libaio, with which DeepSpeed builds async_io")
    own_folder = folder / f"nvme_{os.environ['LAUNCHED_RANK']}"
    own_folder.mkdir()
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": str(own_folder)}}
    return check_syncs([Case(stage=3, precision="bf16", deepspeed={"zero_optimization": nvme})])


def ranks_over_gloo(folder: Path) -> str:
    found, world = [], None
    for stage in (0, 1, 2):
        case = over_gloo(Case(stage=stage, interval=NEVER))
        swarm = ds_pso.init(config(case, 2), world=world)
        world = swarm.world
        if not dist.is_initialized():
            deepspeed.init_distributed("gloo")
        try:
            engine = build_engine(case, swarm.ds_config)
            swarm.attach(engine)
            train(case, engine, range(1))
        except RuntimeError as error:
            raise NotTried(f"gloo cannot be DeepSpeed's own backend here: {str(error).splitlines()[0]}") from error
        check_a_sync(case, swarm, engine)
        found.append(f"ZeRO {stage}")
    return f"{', '.join(found)}; {dist.get_backend_config()} inside"


def peers_over_nccl(folder: Path) -> str:
    needs_gpus(2)
    return _over_nccl()


def particles_over_nccl(folder: Path) -> str:
    needs_gpus(4)
    return _over_nccl()


def _over_nccl() -> str:
    """The rules and the wires, with peers over NCCL."""
    cases = [*RULES, *(Case(sync_mode="diloco", steps=6, swarm={"wire": wire}) for wire in FORMATS)]
    for case, swarm, engine in one_after_the_other(cases):
        assert swarm.world.peers.backend == "nccl"
        train(case, engine)
        found = working_weights(engine)
        if "wire" in case.swarm:
            assert_alike(swarm, bits(found), f"weights after {case.swarm['wire']}")
        else:
            assert_close(found, train_particles(case)[swarm.particle], rtol=1e-4, atol=1e-4)
    return f"{len(cases)} trainings"
