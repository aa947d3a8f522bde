"""An exported model is the mean of the particles, or the best of them, and transformers opens it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from variants import slow_but

import ds_pso

from .jobs import (
    Case,
    Net,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    build_engine,
    config,
    master_pieces,
    place,
    swarm_of,
    train,
    working_weights,
)


def export_both(case: Case, folder: Path) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))  # one sync point, and a step apart
        before = working_weights(engine)
        swarm.export(folder / "mean")
        swarm.export(folder / "best", "best")
        swarm.export(folder / "mean")  # again: replaces the first
        assert_equal(working_weights(engine), before)
        return master_pieces(swarm), before, swarm.last_losses


def read(folder: Path) -> Weights:
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("stage", "precision"),
    slow_but([(2, "fp32"), (3, "bf16")], product([0, 1, 2, 3], ["fp32", "bf16"])),
)
def test_mean_and_best(pool: Pool, tmp_path: Path, stage: int, precision: str) -> None:
    case = Case(stage=stage, precision=precision, sync_mode="pso", batch_norm=precision == "fp32")
    ranks = pool.run(export_both, case, tmp_path)
    like = {name: value for name, value in ranks[0][1].items() if not name.startswith("norm.running")}
    like.pop("norm.num_batches_tracked", None)
    masters = [assemble([rank[0] for rank in ranks[start : start + 2]], like) for start in (0, 2)]
    best = int(np.argmin(ranks[0][2]))
    for folder, truth, of in (
        ("mean", {name: (masters[0][name] + masters[1][name]) / 2 for name in like}, (0, 2)),
        ("best", masters[best], (2 * best, 2 * best)),
    ):
        found = read(tmp_path / folder)
        rounded = {name: torch.from_numpy(value).to(case.dtype).float().numpy() for name, value in truth.items()}
        assert_close({name: found[name] for name in like}, rounded, rtol=1e-6, atol=1e-7)
        if case.batch_norm:
            for name in ("norm.running_mean", "norm.running_var"):  # of rank 0 of the particles
                np.testing.assert_allclose(
                    found[name], (ranks[of[0]][1][name] + ranks[of[1]][1][name]) / 2, rtol=1e-6, err_msg=name
                )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "mean"], "no temporary folder stays"


def export_one_particle(case: Case, folder: Path) -> Weights:
    with swarm_of(case) as (swarm, engine):
        train(case, engine)
        swarm.export(folder)
        return working_weights(engine)


@pytest.mark.parametrize("stage", slow_but([3], [0, 2, 3]))
@pytest.mark.parametrize("sync_mode", ["allreduce", "local_sgd"])
def test_one_particle(pool: Pool, tmp_path: Path, stage: int, sync_mode: str) -> None:
    case = Case(stage=stage, particles=1, sync_mode=sync_mode)
    weights = pool.run(export_one_particle, case, tmp_path / "model", world_size=2)[0]
    assert_equal(read(tmp_path / "model"), weights)


def train_frozen(case: Case, folder: Path) -> Weights:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        torch.manual_seed(0)
        model = Net()
        model.norm.bias.requires_grad_(False)
        engine = build_engine(case, swarm.ds_config, model)
        swarm.attach(engine)
        train(case, engine)
        swarm.export(folder)
        return working_weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_are_exported_too(pool: Pool, tmp_path: Path, stage: int) -> None:
    weights = pool.run(train_frozen, Case(stage=stage), tmp_path / "model")[0]
    assert_close(read(tmp_path / "model"), weights, rtol=1e-6, atol=1e-7)


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def train_llama(case: Case, tied: bool, folder: Path) -> np.ndarray:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine = build_engine(case, swarm.ds_config, llama(tied))
        swarm.attach(engine)
        for step in range(case.steps):
            torch.manual_seed(10 * swarm.world.layout.rank + step)
            tokens = torch.randint(0, 37, (2, 9))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        swarm.export(folder)
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=torch.arange(30).view(2, 15)).logits.float().numpy()


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "case",
    [
        *[Case(stage=0), Case(stage=3, precision="bf16")],
        *(pytest.param(case, marks=pytest.mark.slow) for case in [Case(stage=2, precision="bf16"), Case(stage=3)]),
    ],
    ids=str,
)
def test_transformers_opens_it(pool: Pool, tmp_path: Path, case: Case, tied: bool) -> None:
    logits = pool.run(train_llama, case, tied, tmp_path / "llama")
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=case.dtype).eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(30).view(2, 15)).logits.float().numpy()
    np.testing.assert_allclose(found, logits[0], rtol=1e-5, atol=1e-5 if case.precision == "fp32" else 2e-2)
    stored = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (stored["architectures"], stored["tie_word_embeddings"]) == (["LlamaForCausalLM"], tied)
    assert not np.allclose(llama(tied)(input_ids=torch.arange(30).view(2, 15)).logits.detach().numpy(), found)


def export_nonsense(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, _):
        swarm.export(folder, "worst")


def export_nan(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, _):
        for tensor in swarm.session.synchronizer.parts.shards.tensors:
            tensor.fill_(float("nan"))
        swarm.export(folder)


@pytest.mark.parametrize(
    ("body", "text"), [(export_nonsense, "export which = 'worst'"), (export_nan, "no particle has finite weights")]
)
def test_what_cannot_be_exported(pool: Pool, tmp_path: Path, body: Any, text: str) -> None:
    for outcome in pool.outcomes(body, Case(), tmp_path / "model"):
        assert (outcome.kind, text in outcome.text) == ("ConfigError", True), outcome
    assert list(tmp_path.iterdir()) == []
