"""Particles with batches of their own: each sample counts alike, in the data and in the mean."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from variants import slow_but

from ds_pso.errors import ConfigError

from .jobs import Case, Net, Weights, assert_close, assert_equal, swarm_of, working_weights

SAMPLES, SEED = 70, 5
# 6 samples of a step on each of the two ranks of the first particle, and 4 on those of the second.
UNEQUAL = [{"train_micro_batch_size_per_gpu": 6}, {"gradient_accumulation_steps": 2}]
A_STEP = 2 * (6 + 4)
CASE = Case(
    interval=1,
    steps=5,  # more than an epoch has
    optimizer="SGD",
    lr=0.1,
    seed=0,
    deepspeed={"train_micro_batch_size_per_gpu": 2},
    swarm={"per_particle": UNEQUAL},
)


def dataset() -> TensorDataset:
    x = torch.randn(SAMPLES, 7, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3] * 2, torch.arange(SAMPLES))


def learn(swarm: Any, engine: Any, steps: int) -> list[list[int]]:
    """Train to this optimizer step; returns the numbers of this rank's samples in each step."""
    size = swarm.ds_config["train_micro_batch_size_per_gpu"]
    sampler = swarm.session.samplers[0] if swarm.session.samplers else swarm.sampler(dataset(), seed=SEED)
    seen: list[list[int]] = [[]]
    while engine.global_steps < steps:
        for x, y, index in DataLoader(dataset(), size, sampler=sampler):
            before = engine.global_steps
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()
            seen[-1] += index.tolist()
            if engine.global_steps > before:
                seen.append([])
            if engine.global_steps == steps:
                break
    return seen[:-1]


def weights_and_samples(case: Case) -> tuple[Weights, list[list[int]], list[float]]:
    with swarm_of(case) as (swarm, engine):
        seen = learn(swarm, engine, case.steps)
        return working_weights(engine), seen, list(swarm.session.last_sync.note["weights"])


def one_process(batches: list[list[int]]) -> Weights:
    """Plain SGD on whole batches, in torch alone."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=CASE.lr)
    x, y, _ = dataset().tensors
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_a_sync_at_every_step_is_a_large_batch(pool: Pool, stage: int) -> None:
    found = pool.run(weights_and_samples, replace(CASE, stage=stage))
    seen = [samples for _, samples, _ in found]
    assert [[len(step) for step in rank] for rank in seen] == [[6] * 5] * 2 + [[4] * 5] * 2
    steps = [[*itertools.chain(*(rank[step] for rank in seen))] for step in range(CASE.steps)]
    for epoch in (steps[:3], steps[3:]):
        assert len({*itertools.chain(*epoch)}) == A_STEP * len(epoch), "a sample comes twice in an epoch"
    for weights, _, counts in found:
        assert_close(weights, one_process(steps))
        np.testing.assert_allclose(counts, [0.6, 0.4])


def test_all_may_count_alike(pool: Pool) -> None:
    case = replace(CASE, swarm={**CASE.swarm, "particle_weights": "equal"})
    for _, _, counts in pool.run(weights_and_samples, case):
        assert counts == [0.5, 0.5]


def whole(case: Case) -> Weights:
    with swarm_of(case) as (swarm, engine):
        learn(swarm, engine, case.steps)
        return working_weights(engine)


def first_part(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, engine):
        learn(swarm, engine, 2)
        swarm.save(folder)


def second_part(case: Case, folder: Path, reshape: bool = False) -> Weights:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(dataset(), seed=SEED)
        swarm.load(folder, reshape=reshape)
        learn(swarm, engine, case.steps)
        return working_weights(engine)


def test_it_goes_on_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    case = replace(CASE, interval=2, optimizer="AdamW", lr=0.02, swarm={**CASE.swarm, "wire": "int4"})
    pool.run(first_part, case, tmp_path / "saved")
    expected = pool.run(whole, case)
    for reshape in (False, True):  # which changes nothing on the same ranks
        for was, now in zip(expected, pool.run(second_part, case, tmp_path / "saved", reshape), strict=True):
            assert_equal(now, was)


def refusals(case: Case) -> tuple[str, str]:
    """What is said of another batch than the config's, given to the sampler and had by the engine."""
    with swarm_of(case, attach=False) as (swarm, engine):
        with pytest.raises(ConfigError) as of_sampler:
            swarm.sampler(dataset(), batch_size=5)
        if swarm.particle == 1:
            engine.train_micro_batch_size_per_gpu = lambda: 5
        with pytest.raises(ConfigError) as of_engine:
            swarm.attach(engine)
        return str(of_sampler.value), str(of_engine.value)


def test_another_batch_than_the_configs_is_refused(pool: Pool) -> None:
    ranks = pool.run(refusals, CASE)
    assert ranks[-1][0].startswith("swarm.sampler batch_size = 5: swarm.per_particle says 2 for particle 1; ")
    for _, of_engine in ranks:  # the other particle would wait for this one
        assert of_engine.startswith("train_micro_batch_size_per_gpu = 5: swarm.per_particle says 2 for particle 1; ")
