"""One run: what every particle does, in a simulation and in a real swarm alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils.data import BatchSampler

from benchmarks.convergence.cells import VARIANTS, Cell
from benchmarks.convergence.data import Data, Split, load, take
from benchmarks.convergence.results import Outcome
from benchmarks.convergence.tasks import TASKS, Task
from benchmarks.table import machine, versions
from ds_pso import Swarm
from ds_pso.errors import ConfigError
from ds_pso.shards import find_shards

EVALUATION_BATCH = 50


def config_of(cell: Cell, world_size: int, zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a cell that ``world_size`` ranks run."""
    task = TASKS[cell.task]
    optimizer = {"type": task.optimizer["type"], "params": {"lr": cell.lr, **task.optimizer["params"]}}
    schedule = {
        "total_num_steps": cell.steps,
        "warmup_num_steps": max(1, cell.steps // 20),
        "warmup_max_lr": cell.lr,
        "decay_ratio": 0.1,
    }
    return {
        "train_micro_batch_size_per_gpu": cell.batch // world_size,
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupHoldDecayLR", "params": schedule},
        "gradient_clipping": task.clip,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "swarm": {
            "particles": cell.num_worlds,
            "sync_mode": {"single": "allreduce", "none": "local_sgd"}.get(cell.rule, cell.rule),
            "sync_interval": cell.interval or cell.steps + 1,  # beyond the end: never
            "optimizer_state": cell.optimizer_state,
            "wire": cell.wire,
            "delay": cell.delay,
            "fragments": cell.fragments,
            "streaming": cell.streaming,
            "schedule": _schedule(cell),
            # Without it: what the rules themselves do about unequal particles is the question.
            **({} if cell.quarantine else {"quarantine_loss": None}),
            **({cell.rule: dict(VARIANTS[cell.variant])} if cell.variant else {}),
        },
    }


def _schedule(cell: Cell) -> dict[str, Any]:
    if cell.drift:
        # In a simulation the clock means nothing.
        return {"type": "adaptive", "drift": cell.drift, "compute_share": 0, "warmup_steps": cell.warmup}
    return {"warmup_steps": cell.warmup}


def train(swarm: Swarm, cell: Cell, folder: Path | None = None) -> Outcome:
    """Train and evaluate one cell; called on all ranks, and returns the same on all but for the time.

    Args:
        folder: of the image data; see ``data.load``.
    """
    begin = time.perf_counter()
    task = TASKS[cell.task]
    data = load(swarm, task.data, folder)
    _make_unequal(swarm, cell)
    torch.manual_seed(cell.seed)
    model = task.build(data, cell.scale)
    num_parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
    engine = swarm.attach(engine, probe=lambda index: _probe_loss(engine, task, data.probe, index))
    curve = _run(swarm, engine, cell, data)

    split = data.validation if cell.split == "validation" else data.test
    loss, accuracy = evaluate(swarm, engine, cell, split)
    train_loss, train_accuracy = evaluate(swarm, engine, cell, take(data.train, task.train_slice))
    if cell.num_worlds == 1:  # a ring all-reduce of fp32 gradients, at every step
        received = cell.steps * 2 * (cell.particles - 1) / cell.particles * 4 * num_parameters
    else:
        received = swarm.total_bytes() / cell.particles
    return Outcome(
        loss=loss,
        accuracy=accuracy,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        megabytes=received / 1e6,
        curve=curve,
        seconds=time.perf_counter() - begin,
        how="simulated" if swarm.world.peers.backend == "simulated" else "real",
        machine=machine(),
        versions=versions(),
    )


def _run(swarm: Swarm, engine: Any, cell: Cell, data: Data) -> str:
    """The training loop; returns the curve."""
    task, layout = TASKS[cell.task], swarm.world.layout
    steps = swarm.ds_config["scheduler"]["params"]["total_num_steps"]  # fewer on a slow particle
    micro_batch = cell.batch // layout.world_size
    # Of the samples of a step, in the order of ranks, the first ``task.batch`` are particle 0's, also in allreduce.
    disturbed = min(max(0, task.batch - layout.rank * micro_batch), micro_batch)
    disturbed = disturbed if cell.situation == "shuffled_labels" else 0
    curve = []
    for step, rows in zip(range(1, steps + 1), _batches(swarm, cell, data.train), strict=False):
        batch = take(data.train, rows)
        if disturbed:
            noise, rest = task.disturb(take(batch, slice(disturbed))), take(batch, slice(disturbed, None))
            batch = tuple(torch.cat(parts) for parts in zip(noise, rest, strict=True))
        if cell.situation == "nan" and step == steps // 2 + max(1, cell.interval // 2) and layout.particle == 0:
            _spoil(engine)
        loss, _ = task.loss(engine, batch)
        engine.backward(loss)
        engine.step()
        if cell.eval_every and step % cell.eval_every == 0:
            curve.append(f"{step}:{evaluate(swarm, engine, cell, data.test)[1]:.5g}")
    return " ".join(curve)


def _batches(swarm: Swarm, cell: Cell, split: Split) -> Iterator[torch.Tensor]:
    """Rows of this rank's batches, epoch after epoch."""
    layout = swarm.world.layout
    rows = torch.arange(len(split[0]))
    if cell.situation == "non_iid":
        rows = _deal_by_key(split, cell, layout.world_size)
    sampler = swarm.sampler(rows, shuffle=cell.situation != "non_iid", seed=cell.seed)
    batches = BatchSampler(sampler, cell.batch // layout.world_size, drop_last=True)
    while True:
        for batch in batches:
            yield rows[batch].to(split[0].device)


def _deal_by_key(split: Split, cell: Cell, world_size: int) -> torch.Tensor:
    """An order of the samples in which each particle has a part of its own of the sorted data, shuffled.

    Rank r takes every ``world_size``-th sample beginning with the r-th, so the parts are interleaved.
    """
    sort_by = TASKS[cell.task].sort_by
    order = torch.arange(len(split[0])) if sort_by is None else sort_by(split).cpu().argsort(stable=True)
    turn = max(world_size, cell.particles)  # in one world, allreduce plays all particles
    order = order[: len(order) // turn * turn]
    generator = torch.Generator().manual_seed(cell.seed)
    parts = [part[torch.randperm(len(part), generator=generator)] for part in order.chunk(cell.particles)]
    # (particle, turn, rank in the particle) -> (turn, particle, rank in the particle)
    return torch.stack(parts).view(cell.particles, -1, turn // cell.particles).transpose(0, 1).reshape(-1)


def _make_unequal(swarm: Swarm, cell: Cell) -> None:
    """Change this particle's learning rate or pace as the situation says."""
    particle, last = swarm.particle, max(1, cell.particles - 1)
    factors = {
        "high_lr": 10.0 if particle == 0 else 1.0,
        "lr_spread": 4.0 ** (2 * particle / last - 1),
        "all_low": 1 / 16,
        "all_high": 8.0,
    }
    schedule = swarm.ds_config["scheduler"]["params"]
    schedule["warmup_max_lr"] *= factors.get(cell.situation, 1.0)
    if cell.situation == "half_speed" and particle == 0:
        schedule["total_num_steps"] //= 2
        schedule["warmup_num_steps"] = max(1, schedule["warmup_num_steps"] // 2)
        # Half as many steps between two syncs, so that these stay common.
        swarm.config = swarm.config.model_copy(update={"sync_interval": cell.interval // 2})


def _spoil(engine: Any) -> None:
    shards = find_shards(engine)
    for tensor in shards.tensors:
        tensor.fill_(math.nan)
    shards.publish()


def _probe_loss(engine: Any, task: Task, split: Split, index: int) -> float:
    """Loss on a batch that is another at each sync point, and the same for all particles."""
    rows = (torch.arange(task.probe_batch) + index * task.probe_batch) % len(split[0])
    engine.eval()
    with torch.no_grad():
        loss, _ = task.loss(engine, take(split, rows.to(split[0].device)))
    engine.train()
    return float(loss)


@torch.no_grad()
def evaluate(swarm: Swarm, engine: Any, cell: Cell, split: Split) -> tuple[float, float]:
    """Loss and accuracy of the consensus, the ranks sharing the samples; for "none" the particles' mean.

    NaN if no particle has finite weights. Called on all ranks.
    """
    if cell.rule == "none":
        return _evaluate(swarm, engine, cell, split, swarm.world.layout.shard_rank, swarm.world.layout.particle_size)
    try:
        with swarm.consensus():
            return _evaluate(swarm, engine, cell, split, swarm.world.layout.rank, swarm.world.layout.world_size)
    except ConfigError:  # there is no consensus; all ranks raise it
        return math.nan, math.nan


def _evaluate(swarm: Swarm, engine: Any, cell: Cell, split: Split, first: int, every: int) -> tuple[float, float]:
    mine = take(split, slice(first, None, every))
    loss_sum = correct = count = 0.0
    engine.eval()
    for start in range(0, len(mine[0]), EVALUATION_BATCH):
        batch = take(mine, slice(start, start + EVALUATION_BATCH))
        loss, right = TASKS[cell.task].loss(engine, batch)
        loss_sum, correct, count = loss_sum + float(loss) * len(batch[0]), correct + right, count + len(batch[0])
    engine.train()
    # Means over the ranks of each particle; their ratios are means over all samples.
    sums = [math.fsum(swarm.gather(value)) for value in (loss_sum, correct, count)]
    mean, accuracy = sums[0] / sums[2], sums[1] / sums[2]
    return mean, accuracy if math.isfinite(mean) else math.nan  # NaN is a guess, and right sometimes


def clean_up() -> None:
    """An engine refers to itself; forget it before the next one is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
