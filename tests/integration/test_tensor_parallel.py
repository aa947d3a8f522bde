"""AutoTP inside a particle: the swarm is the same, whoever holds which part of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from variants import slow_but

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.errors import ConfigError, UnsupportedError
from ds_pso.export.offline import consolidate
from ds_pso.shards.tensor_parallel import made_whole
from ds_pso.swarm import Swarm

from .jobs import Case, Weights, assert_close, assert_equal, config, optimizer_state, place

ROWS, LENGTH, VOCABULARY = 4, 8, 24
CASE = Case(steps=5, interval=2, optimizer="SGD", lr=0.5, momentum=0.5, seed=0)


def build_llama(intermediate_size: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


@contextlib.contextmanager
def split_swarm(case: Case, split: int, intermediate_size: int = 24) -> Iterator[tuple[Swarm, Any]]:
    """A swarm whose particles split each layer over ``split`` ranks, and its engine."""
    size = place(case)[2]
    keys: dict[str, Any] = {"train_micro_batch_size_per_gpu": ROWS * split // size}
    if split > 1:
        keys["tensor_parallel"] = {"autotp_size": split}
    case = replace(case, deepspeed={**keys, **case.deepspeed})
    with ds_pso.init(config(case, size)) as swarm:
        model = build_llama(intermediate_size)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        yield swarm, swarm.attach(engine)


def tokens(particle: int, step: int) -> torch.Tensor:
    """What a particle learns from at a step, shape (rows, length)."""
    generator = torch.Generator().manual_seed(1000 * particle + step)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    rows = (start + 5 * torch.arange(LENGTH)) % VOCABULARY
    noise = torch.rand(rows.shape, generator=generator) < 0.1 * (particle + 1)
    return torch.where(noise, torch.randint(VOCABULARY, rows.shape, generator=generator), rows)


def train_llama(case: Case, split: int, engine: Any, steps: range | None = None) -> list[float]:
    particle, rank, size = place(case)
    rows, losses = ROWS * split // size, []
    for step in range(case.steps) if steps is None else steps:
        mine = tokens(particle, step)[rank // split * rows :][:rows]
        loss = engine(input_ids=mine, labels=mine, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def own_parts(engine: Any, *, whole: bool = False) -> Weights:
    """The working weights of this rank's part of each layer, or of all of it; ZeRO 3 gathers them."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        gather = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if gather else contextlib.nullcontext():
            value = made_whole(parameter, parameter) if whole else parameter
            found[name] = value.detach().float().numpy().copy()
    return found


def whole_weights(engine: Any) -> Weights:
    return own_parts(engine, whole=True)


def life(case: Case, split: int) -> tuple[list[float], Weights, Weights, tuple[float, ...]]:
    """Losses of this rank, whole weights at the end, its own parts of them, and the losses at the last sync."""
    with split_swarm(case, split) as (swarm, engine):
        losses = train_llama(case, split, engine)
        return losses, whole_weights(engine), own_parts(engine), swarm.last_losses


@pytest.mark.parametrize(
    ("stage", "sync_mode"),
    slow_but([(2, "diloco"), (3, "local_sgd")], [(s, m) for s in range(4) for m in ("local_sgd", "diloco", "pso")]),
)
def test_a_swarm_with_split_layers_is_the_one_with_whole_ones(pool: Pool, stage: int, sync_mode: str) -> None:
    options = {"inertia": 0.3, "cognitive": 0.5} if sync_mode == "pso" else {}
    case = replace(CASE, stage=stage, sync_mode=sync_mode, options=options)
    split = pool.run(life, case, 2)
    whole = pool.run(life, case, 1, world_size=2)
    for number, (losses, weights, parts, last_losses) in enumerate(split):
        expected_losses, expected, _, expected_last = whole[number // 2]
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
        np.testing.assert_allclose(last_losses, expected_last, rtol=1e-4)
        assert_close(weights, expected, rtol=1e-3, atol=1e-5)
        assert parts["model.layers.0.mlp.up_proj.weight"].shape == (12, 16), "nothing was split"


def parts_after_a_sync(case: Case) -> Weights:
    with split_swarm(case, 2) as (_, engine):
        train_llama(case, 2, engine, range(2))
        return own_parts(engine)


@pytest.mark.parametrize("wire", slow_but(["bf16"], ["fp32", "bf16"]))
def test_what_all_ranks_have_whole_stays_the_same_on_all(pool: Pool, wire: str) -> None:
    ranks = pool.run(parts_after_a_sync, replace(CASE, sync_mode="diloco", swarm={"wire": wire}))
    for name in (name for name in ranks[0] if "norm" in name or "embed" in name):
        for other in ranks[1:]:
            np.testing.assert_array_equal(other[name], ranks[0][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_with_samples_of_their_own(pool: Pool, stage: int) -> None:
    case = replace(CASE, stage=stage)
    split = pool.run(life, case, 2, world_size=8)
    whole = pool.run(life, case, 1, world_size=4)
    for number, (losses, weights, *_) in enumerate(split):
        np.testing.assert_allclose(losses, whole[number // 2][0], rtol=1e-4)
        assert_close(weights, whole[number // 4 * 2][1], rtol=1e-3, atol=1e-5)


def see(case: Case) -> tuple[list[int], int]:
    with split_swarm(case, 2) as (swarm, _):
        return list(swarm.sampler(range(16), batch_size=4)), swarm.session.start_record()["parameters"]


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_the_ranks_of_a_layer_see_the_same_samples(pool: Pool, stage: int) -> None:
    ranks = pool.run(see, replace(CASE, stage=stage))
    seen = [samples for samples, _ in ranks]
    assert (seen[0], seen[2]) == (seen[1], seen[3])
    assert sorted(seen[0] + seen[2]) == list(range(16))
    assert {number for _, number in ranks} == {sum(p.numel() for p in build_llama().parameters())}


# -- checkpoints and export -------------------------------------------------------------------


def interrupted(case: Case, folder: Path, stop: int | None, reshape: bool = False) -> tuple[Weights, Any]:
    """Train to the end; save at step ``stop``, or resume from there."""
    with split_swarm(case, 2) as (swarm, engine):
        if stop is None:
            swarm.load(folder, reshape=reshape)
        else:
            train_llama(case, 2, engine, range(stop))
            swarm.save(folder)
        train_llama(case, 2, engine, range(engine.global_steps, case.steps))
        return own_parts(engine), optimizer_state(engine)


RESUMED = replace(CASE, optimizer="AdamW", momentum=0.0, lr=0.02, sync_mode="diloco")


@pytest.mark.parametrize("stage", slow_but([2], [0, 1, 2, 3]))
def test_resuming_is_bit_exact(pool: Pool, tmp_path: Path, stage: int) -> None:
    case = replace(RESUMED, stage=stage)
    straight = pool.run(interrupted, case, tmp_path, 3)
    for (parts, moments), (expected, expected_moments) in zip(
        pool.run(interrupted, case, tmp_path, None), straight, strict=True
    ):
        assert_equal(parts, expected)
        assert_equal(moments, expected_moments)
    with pytest.raises(UnsupportedError, match="ranks that had a part of each layer"):
        consolidate(next(tmp_path.glob("step_*")))
    for outcome in pool.outcomes(interrupted, replace(case, particles=1), tmp_path, None, True, world_size=2):
        assert outcome.kind == "CheckpointError", outcome
        assert "are not divided anew" in outcome.text


def export(case: Case, folder: Path) -> tuple[Weights, Weights]:
    """Whole weights, of the parts that this rank has, before and after."""
    with split_swarm(case, 2) as (swarm, engine):
        train_llama(case, 2, engine, range(3))
        before = whole_weights(engine)
        swarm.export(folder)
        train_llama(case, 2, engine, range(3, 4))
        swarm.sync()
        return before, whole_weights(engine)


@pytest.mark.parametrize("stage", slow_but([3], [0, 1, 2, 3]))
def test_the_export_is_the_mean_and_opens(pool: Pool, tmp_path: Path, stage: int) -> None:
    ranks = pool.run(export, replace(CASE, stage=stage), tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = {name: p.detach().numpy() for name, p in opened.named_parameters()}
    assert_close(found, {name: (ranks[0][0][name] + ranks[2][0][name]) / 2 for name in found})
    assert_equal(ranks[0][1], ranks[2][1])  # training goes on, and syncs


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "section", "text"),
    [
        ({"sequence_parallel_size": 2}, {}, "the layers of a particle are split, or its sequences"),
        ({}, {"wire": "int4"}, "this wire rounds an element by what lies beside it"),
        ({"tensor_parallel": {"autotp_size": "2"}}, {}, "must be a whole number of at least 0"),
    ],
)
def test_what_does_not_go_with_split_layers(keys: dict[str, Any], section: dict[str, Any], text: str) -> None:
    swarm = {"particles": 2, "sync_mode": "diloco", **section}
    with pytest.raises(ConfigError, match=text):
        load_config({"tensor_parallel": {"autotp_size": 2}, **keys, "swarm": swarm})


def split_unknown_to_init(case: Case) -> None:
    """Only the engine's config says that layers are split."""
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        model = build_llama()
        given = {**swarm.ds_config, "tensor_parallel": {"autotp_size": 2}, "train_micro_batch_size_per_gpu": ROWS}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=given)
        swarm.attach(engine)


def test_a_wire_is_refused_where_init_did_not_know_of_split_layers(pool: Pool) -> None:
    for outcome in pool.outcomes(split_unknown_to_init, replace(CASE, swarm={"wire": "int4"})):
        assert outcome.kind == "ConfigError", outcome
        assert "swarm.attach: swarm.wire" in outcome.text


def attach_in_fragments(case: Case, intermediate_size: int) -> list[float]:
    with split_swarm(case, 2, intermediate_size) as (_, engine):
        return train_llama(case, 2, engine)


BY_PLACE = {
    "fragments = 2": {"delay": 2, "fragments": 2},
    'wire = "bf16"': {"wire": "bf16"},
    'moments.wire = "bf16"': {"optimizer_state": "average", "moments": {"wire": "bf16"}},
}


@pytest.mark.parametrize(("intermediate_size", "kind"), [(24, None), (25, "UnsupportedError")])
@pytest.mark.parametrize("key", BY_PLACE)
def test_what_goes_by_place_needs_equal_parts(pool: Pool, key: str, intermediate_size: int, kind: str | None) -> None:
    case = replace(CASE, interval=3, swarm=BY_PLACE[key])
    for outcome in pool.outcomes(attach_in_fragments, case, intermediate_size):
        assert outcome.kind == kind, outcome
        assert kind is None or f"swarm.{key}: layers are split into unequal parts" in outcome.text
