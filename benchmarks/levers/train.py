"""One run: a swarm of four particles in one process, or one world that sees what all of them see."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

import ds_pso
from benchmarks.levers.results import Outcome, Run
from benchmarks.levers.settings import HELD_OUT, PARTICLES, SEQ_LENGTH, VOCABULARY, Setting, Size, optimizer_of
from benchmarks.table import machine, versions
from ds_pso import Swarm
from ds_pso.errors import ConfigError
from ds_pso.shards import find_shards
from ds_pso.training.model import build_model, causal_loss
from ds_pso.training.text import Blocks, Corpus, load_corpus

CACHE = Path(__file__).resolve().parents[1] / ".cache"
_EVALUATION_BATCH = 32


def config_of(size: Size, setting: Setting, lr: float) -> dict[str, Any]:
    """DeepSpeed's JSON of a run."""
    optimizer, rates, clipping = optimizer_of(setting.inner, lr)
    worlds = setting.worlds
    schedule = {
        "total_num_steps": size.steps,
        "warmup_num_steps": size.steps // 20,
        "warmup_min_lr": 0.0 if isinstance(rates, float) else [0.0] * len(rates),
        "warmup_max_lr": rates,
        "decay_ratio": 0.2,
    }
    return {
        "train_micro_batch_size_per_gpu": size.batch * PARTICLES // worlds,
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupHoldDecayLR", "params": schedule},
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "swarm": {"particles": worlds, **setting.section},
    }


def simulate(size: Size, setting: Setting, run: Run) -> Outcome:
    """Train and evaluate."""
    return ds_pso.simulate(config_of(size, setting, run.lr), lambda swarm: _train(swarm, size, setting, run))[0]


def load(swarm: Swarm, size: Size) -> Corpus:
    """The text, prepared once per disk."""
    name = f"levers_{Path(size.text).name}_{VOCABULARY}"
    return load_corpus(swarm, size.text, CACHE / name, SEQ_LENGTH, vocabulary=VOCABULARY)


class _Pull:
    """Draws a particle back to the last common weights, at every step and without a byte.

    Source: the pull of PALSGD, arXiv 2504.18454, on average: there it replaces some gradient steps, at random.
    """

    def __init__(self, swarm: Swarm, engine: Any, part: float) -> None:
        self._shards, self._part = find_shards(engine), part
        self._remember()
        swarm.on_sync(lambda _: self._remember())

    def _remember(self) -> None:
        self._common = [t.clone() for t in self._shards.tensors]

    def __call__(self) -> None:
        for x, common in zip(self._shards.tensors, self._common, strict=True):
            x.lerp_(common, self._part)
        self._shards.publish()


def _train(swarm: Swarm, size: Size, setting: Setting, run: Run) -> Outcome:
    begin = time.perf_counter()
    corpus = load(swarm, size)
    torch.manual_seed(run.seed)
    model = build_model(size.model, corpus.tokenizer, SEQ_LENGTH, {})
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
    engine = swarm.attach(engine)
    pull = _Pull(swarm, engine, setting.pull) if setting.pull else None
    batch = engine.train_micro_batch_size_per_gpu()
    batches = BatchSampler(swarm.sampler(corpus.train, seed=run.seed), batch, drop_last=True)
    step = 0
    while step < size.steps:
        for rows in batches:
            loss = causal_loss(engine, _stack(corpus.train, rows))
            engine.backward(loss)
            engine.step()
            if pull is not None:
                pull()
            step += 1
            if step == size.steps:
                break
    if setting.worlds == 1:  # a ring all-reduce of fp32 gradients, at every step
        received = size.steps * 2 * (PARTICLES - 1) / PARTICLES * 4 * parameters
    else:
        received = swarm.total_bytes() / PARTICLES
    order = torch.randperm(len(corpus.held_out), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        with swarm.consensus():
            found = [
                _evaluate(engine, corpus.held_out, rows) for rows in (order[:HELD_OUT], order[HELD_OUT:][:HELD_OUT])
            ]
    except ConfigError:  # no particle has finite weights
        found = [math.nan, math.nan]
    return Outcome(
        validation_loss=found[0],
        loss=found[1],
        megabytes=received / 1e6,
        parameters=parameters,
        seconds=time.perf_counter() - begin,
        machine=machine(),
        versions=versions(),
    )


def _stack(blocks: Blocks, rows: list[int]) -> Tensor:
    return torch.stack([blocks[i] for i in rows])


@torch.no_grad()
def _evaluate(engine: Any, blocks: Blocks, rows: list[int]) -> float:
    engine.eval()
    parts = [rows[start : start + _EVALUATION_BATCH] for start in range(0, len(rows), _EVALUATION_BATCH)]
    total = sum(float(causal_loss(engine, _stack(blocks, part))) * len(part) for part in parts)
    engine.train()
    return total / len(rows)
