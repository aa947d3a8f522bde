"""Mixtures of experts of transformers', of which every rank holds all experts: to DeepSpeed they are dense models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from variants import slow_but

import ds_pso
from ds_pso.export.offline import consolidate, find_checkpoint, write
from ds_pso.swarm import Swarm

from .jobs import (
    Case,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    build_engine,
    config,
    master_pieces,
    place,
    working_weights,
)

STAGES = (0, 2, 3)


def model(stage: int = 0, seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    found = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=20,
            moe_intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
        )
    )
    if stage == 3:  # as transformers' users do: experts that no token has chosen are gathered with the others
        deepspeed.utils.set_z3_leaf_modules(found, [Qwen3MoeSparseMoeBlock])
    return found


def swarms(cases: list[Case]) -> Iterator[tuple[Case, Swarm, Any]]:
    world = None
    for case in cases:
        swarm = ds_pso.init(config(case, place(case)[2]), world=world)
        world = swarm.world
        yield case, swarm, swarm.attach(build_engine(case, swarm.ds_config, model(case.stage, swarm.particle)))
    if world is not None:
        world.close()


def train(case: Case, engine: Any, steps: range) -> None:
    particle, rank, size = place(case)
    for step in steps:
        tokens = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(100 * particle + step))
        rows = tokens[rank * 4 // size : (rank + 1) * 4 // size]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()


@dataclass(frozen=True)
class Rank:
    start: Weights
    pieces: list[Any]
    weights: Weights
    later: Weights


def state_of(case: Case, swarm: Swarm, start: Weights) -> Rank:
    step = swarm.engine.global_steps
    now = master_pieces(swarm) if swarm.session.synchronizer else [], working_weights(swarm.engine)
    train(case, swarm.engine, range(step, step + 3))
    return Rank(start, *now, working_weights(swarm.engine))


def lives(cases: list[Case], folder: Path) -> list[Rank]:
    found = []
    for number, (case, swarm, engine) in enumerate(swarms(cases)):
        start = working_weights(engine)
        train(case, engine, range(3))
        swarm.export(folder / str(number) / "model")
        swarm.save(folder / str(number) / "checkpoints")
        found.append(state_of(case, swarm, start))
    return found


def lives_after_resuming(cases: list[Case], folder: Path) -> list[Rank]:
    found = []
    for number, (case, swarm, _) in enumerate(swarms(cases)):
        swarm.load(folder / str(number) / "checkpoints", reshape=True)
        found.append(state_of(case, swarm, {}))
    return found


CASES = [Case(stage=stage) for stage in STAGES]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Rank]]]:
    folder = tmp_path_factory.mktemp("transformers")
    return folder, pool.run(lives, CASES, folder, timeout=120)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_exported_model_is_the_mean_and_opens(saved: Any, number: int) -> None:
    folder, ranks = saved[0] / str(number), [rank[number] for rank in saved[1]]
    for rank in ranks:
        assert_equal(rank.start, ranks[0].start)
    one, two = (assemble([rank.pieces for rank in ranks[k : k + 2]], ranks[0].start) for k in (0, 2))
    assert (one["model.layers.0.mlp.gate.weight"] != two["model.layers.0.mlp.gate.weight"]).any()
    opened, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    found = {name: parameter.detach().numpy() for name, parameter in opened.named_parameters()}
    assert_close(found, {name: (one[name] + two[name]) / 2 for name in one}, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_the_model_in_a_checkpoint_is_the_exported_one(saved: Any, tmp_path: Path, number: int) -> None:
    folder = saved[0] / str(number)
    assert write(consolidate(find_checkpoint(folder)), tmp_path / "model") is None
    expected, found = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "model"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_resuming_is_bit_exact(pool: Pool, saved: Any) -> None:
    for before, after in zip(saved[1], pool.run(lives_after_resuming, CASES, saved[0], timeout=120), strict=True):
        for was, now in zip(before, after, strict=True):
            assert_equal(now.weights, was.weights)
            assert_equal(now.later, was.later)


def test_it_goes_on_with_other_numbers_of_ranks(pool: Pool, saved: Any) -> None:
    after = pool.run(lives_after_resuming, CASES, saved[0], world_size=2, timeout=120)
    for number in range(len(CASES)):
        for particle in (0, 1):
            was = [rank[number] for rank in saved[1]][2 * particle : 2 * particle + 2]
            now = after[particle][number]
            assert_equal(now.weights, was[0].weights)
            assert_equal(assemble([now.pieces], now.weights), assemble([rank.pieces for rank in was], now.weights))
            assert_close(now.later, was[0].later, rtol=1e-3, atol=1e-4)  # sums in another order, under Adam


def ends(cases: list[Case]) -> list[Weights]:
    found = []
    for case, _, engine in swarms(cases):
        train(case, engine, range(4))
        found.append(working_weights(engine))
    return found


@pytest.mark.parametrize("stage", slow_but([2, 3], STAGES))
def test_at_every_step_it_is_one_world(pool: Pool, stage: int) -> None:
    """A swarm of two particles of one rank each, and a world of two ranks."""
    case = Case(stage=stage, interval=1, optimizer="SGD", lr=0.5)
    swarm = pool.run(ends, [case], world_size=2)
    world = pool.run(ends, [replace(case, sync_mode="allreduce")], world_size=2)
    for (mine,), (expected,) in zip(swarm, world, strict=True):
        assert_close(mine, expected, rtol=1e-4, atol=1e-6)
        assert all(np.isfinite(value).all() for value in mine.values())
