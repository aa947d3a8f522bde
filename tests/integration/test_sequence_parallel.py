"""Sequence parallelism inside a particle: the swarm is the same, whoever computes which part of a sequence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from variants import slow_but

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.errors import ConfigError
from ds_pso.export.offline import consolidate
from ds_pso.sampler import SwarmSampler

from .jobs import (
    Case,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    config,
    master_pieces,
    optimizer_state,
    place,
    working_weights,
)
from .sequence_jobs import (
    Attends,
    build,
    loss_of,
    samples,
    sequence_case,
    sequence_swarm,
    start_groups,
    train_sequences,
)

CASE = Case(steps=5, interval=2, optimizer="SGD", lr=0.5, momentum=0.5, seed=0)
PSO = {"inertia": 0.3, "cognitive": 0.5}


def life(case: Case, sequence: int) -> tuple[list[float], Weights, tuple[float, ...], list[Any]]:
    """Losses of this rank, its weights at the end, the losses at the last sync, and its masters."""
    with sequence_swarm(case, sequence) as (swarm, engine, group):
        losses = train_sequences(case, sequence, engine, group)
        return losses, working_weights(engine), swarm.last_losses, master_pieces(swarm)


def assert_same_training(pool: Pool, case: Case, ranks: int, sequence: int, whole_ranks: int) -> None:
    """Compare a swarm whose sequences are divided with one of ``whole_ranks`` ranks whose are not."""
    divided = pool.run(life, case, sequence, world_size=ranks)
    whole = pool.run(life, case, 1, world_size=whole_ranks)
    for number, (losses, weights, last_losses, _) in enumerate(divided):
        particle = number * 2 // ranks
        mates = [whole[particle * whole_ranks // 2 + i] for i in range(whole_ranks // 2)]
        assert_close(weights, mates[0][1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(last_losses, mates[0][2], rtol=1e-5)
        if len(mates) == ranks // sequence // 2:
            mate = mates[number % (ranks // 2) // sequence]
            np.testing.assert_allclose(losses, mate[0], rtol=1e-4)
    whole_model = assemble([pieces for *_, pieces in divided[: ranks // 2]], divided[0][1])
    assert_close(whole_model, divided[0][1])


@pytest.mark.parametrize(
    ("stage", "sync_mode"),
    slow_but([(2, "local_sgd"), (3, "diloco")], [(s, m) for s in range(4) for m in ("local_sgd", "diloco", "pso")]),
)
def test_a_swarm_with_divided_sequences_is_the_one_with_whole_ones(pool: Pool, stage: int, sync_mode: str) -> None:
    case = replace(CASE, stage=stage, sync_mode=sync_mode, options=PSO if sync_mode == "pso" else {})
    assert_same_training(pool, case, ranks=4, sequence=2, whole_ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_particle_of_two_sequences_at_a_time(pool: Pool, stage: int, accumulate: int) -> None:
    case = replace(CASE, stage=stage, accumulate=accumulate)
    assert_same_training(pool, case, ranks=8, sequence=2, whole_ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_trains(pool: Pool, precision: str) -> None:
    ranks = pool.run(life, replace(CASE, stage=1, precision=precision), 2)
    assert_equal(ranks[0][1], ranks[1][1])
    assert all(math.isfinite(loss) for losses, *_ in ranks for loss in losses)


def end_of_training(case: Case, sequence: int) -> Weights:
    with sequence_swarm(case, sequence) as (_, engine, group):
        train_sequences(case, sequence, engine, group)
        return working_weights(engine)


@pytest.mark.parametrize("stage", slow_but([1], [0, 1, 2, 3]))
def test_a_sync_at_every_step_of_sgd_is_one_world(pool: Pool, stage: int) -> None:
    case = replace(CASE, stage=stage, interval=1, momentum=0.0)
    swarm, world = (pool.run(end_of_training, c, 2) for c in (case, replace(case, sync_mode="allreduce")))
    for weights, expected in zip(swarm, world, strict=True):
        assert_close(weights, expected)


def norm_and_loss(case: Case) -> tuple[float, float, float, float]:
    """The norm and the loss that the particle reports; the norm of its weights, and the loss that was trained on."""
    with sequence_swarm(case, 2) as (swarm, engine, group):
        losses = train_sequences(case, 2, engine, group, range(1))
        parts = swarm.session.synchronizer.parts
        report = parts.assessor.report(swarm.session.window)
        weights = np.concatenate([value.ravel() for value in working_weights(engine).values()])
        return report.norm, report.loss, float(np.linalg.norm(weights.astype(np.float64))), losses[0]


@pytest.mark.parametrize("stage", slow_but([0], [0, 1, 2, 3]))
def test_every_weight_and_every_token_counts_once(pool: Pool, stage: int) -> None:
    for norm, loss, expected_norm, expected_loss in pool.run(norm_and_loss, replace(CASE, stage=stage)):
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert loss == pytest.approx(expected_loss, rel=1e-6)


def bytes_of_a_run(case: Case, sequence: int) -> int:
    with sequence_swarm(case, sequence) as (swarm, engine, group):
        train_sequences(case, sequence, engine, group)
        return swarm.totals.bytes_received


@pytest.mark.parametrize("stage", slow_but([2], [0, 1, 2, 3]))
def test_a_rank_receives_as_much_as_one_with_whole_sequences(pool: Pool, stage: int) -> None:
    divided, whole = (pool.run(bytes_of_a_run, replace(CASE, stage=stage), sequence) for sequence in (2, 1))
    assert divided == whole
    assert min(divided) > 0


# -- data -------------------------------------------------------------------------------------


def see(case: Case, early: bool) -> tuple[list[list[int]], dict[str, int]]:
    """The samples of an epoch, from a sampler that was made before the engine or after."""
    size = place(case)[2]
    with ds_pso.init(config(sequence_case(case, size, 2), size)) as swarm:
        sampler = swarm.sampler(range(26), batch_size=3) if early else None
        engine, _ = build(case, swarm.ds_config, start_groups(2))
        swarm.attach(engine)
        sampler = sampler or swarm.sampler(range(26), batch_size=3)
        return [batch.tolist() for batch in DataLoader(range(26), 3, sampler=sampler)], sampler.state_dict()


@pytest.mark.parametrize("early", slow_but([True], [True, False]))
def test_the_ranks_of_a_sequence_see_the_same_samples(pool: Pool, early: bool) -> None:
    first, second, third, fourth = pool.run(see, CASE, early)
    assert first == second
    assert third == fourth
    assert (first[1]["share"], first[1]["of_all"]) == (3, 6)
    seen = [i for batches, _ in (first, third) for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == 24


# -- checkpoints and export -------------------------------------------------------------------


def interrupted(case: Case, folder: Path, sequence: int, stop: int | None, reshape: bool = False) -> Any:
    """Train from a sampler up to the last step; save at step ``stop``, or resume from there."""
    with sequence_swarm(case, sequence) as (swarm, engine, group):
        data = torch.arange(40)
        rows = case.deepspeed["train_micro_batch_size_per_gpu"]
        sampler = swarm.sampler(data, batch_size=rows)
        if stop is None:
            swarm.load(folder, reshape=reshape)
        places = []
        while engine.global_steps < case.steps:
            for batch in DataLoader(data, rows, sampler=sampler):
                places.append(batch.tolist())
                tokens = (batch[:, None] + 3 * torch.arange(9)) % 11
                engine.backward(loss_of(engine, tokens, group))
                engine.step()
                if engine.global_steps == stop:
                    swarm.save(folder)
                if engine.global_steps == case.steps:
                    break
        return working_weights(engine), optimizer_state(engine), places, swarm.totals.bytes_received


RESUMED = replace(
    CASE, optimizer="AdamW", momentum=0.0, lr=0.02, sync_mode="diloco", deepspeed={"train_micro_batch_size_per_gpu": 4}
)


@pytest.mark.parametrize("stage", slow_but([3], [0, 1, 2, 3]))
def test_resuming_is_bit_exact(pool: Pool, tmp_path: Path, stage: int) -> None:
    case = replace(RESUMED, stage=stage)
    straight = pool.run(interrupted, case, tmp_path, 2, 3)
    resumed = pool.run(interrupted, case, tmp_path, 2, None)
    for (weights, moments, places, num_bytes), (again, again_moments, rest, again_bytes) in zip(
        straight, resumed, strict=True
    ):
        assert_equal(again, weights)
        assert_equal(again_moments, moments)
        assert (rest, again_bytes) == (places[3:], num_bytes)


@pytest.mark.parametrize(
    ("stage", "ranks", "sequence"),
    slow_but([(2, 2, 1), (3, 4, 1)], [(s, *to) for s in range(4) for to in ((2, 1), (4, 1), (8, 2))]),
)
def test_the_same_on_other_groups_of_ranks(pool: Pool, tmp_path: Path, stage: int, ranks: int, sequence: int) -> None:
    """Saved by two particles of a sequence each; resumed by particles whose ranks have whole sequences, or of two."""
    # Adam would make something of the gradient of the keys' bias, which is rounding alone.
    case = replace(RESUMED, stage=stage, optimizer="SGD", momentum=0.5, lr=0.5)
    straight = pool.run(interrupted, case, tmp_path, 2, 3)
    parts = ranks // 2 // sequence  # of the data, of a particle
    narrow = replace(case, deepspeed={"train_micro_batch_size_per_gpu": 4 // parts})
    resumed = pool.run(interrupted, narrow, tmp_path, sequence, None, True, world_size=ranks)
    for step in range(2):
        seen = [place for rank in resumed[::sequence] for place in rank[2][step]]
        assert sorted(seen) == sorted(straight[0][2][3 + step] + straight[2][2][3 + step])
    if parts == 1:  # otherwise the particles have other samples than before: all together the same
        for number, (weights, *_) in enumerate(resumed):
            assert_close(weights, straight[number * 4 // ranks][0], rtol=1e-4, atol=1e-5)


def export_both(case: Case, folder: Path) -> Weights:
    with sequence_swarm(case, 2) as (swarm, engine, group):
        train_sequences(case, 2, engine, group)
        swarm.save(folder / "checkpoints")
        swarm.export(folder / "model")
        return working_weights(engine)


@pytest.mark.parametrize("stage", slow_but([2], [0, 1, 2, 3]))
def test_the_export_is_the_mean(pool: Pool, tmp_path: Path, stage: int) -> None:
    ranks = pool.run(export_both, replace(CASE, stage=stage), tmp_path)
    exported = {name: value.numpy() for name, value in load_file(tmp_path / "model/model.safetensors").items()}
    mean = {name: (ranks[0][name] + ranks[2][name]) / 2 for name in ranks[0]}
    assert_close(exported, mean)
    checkpoint = next((tmp_path / "checkpoints").glob("step_*"))
    consolidated = {name: value.numpy() for name, value in consolidate(checkpoint).state_dict.items()}
    assert_equal(consolidated, exported)


# -- what is refused --------------------------------------------------------------------------


def attach_mesh(case: Case) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        deepspeed.init_distributed("gloo")
        engine, _ = build(case, swarm.ds_config, None, mesh_param=(1, 2))
        swarm.attach(engine)


def test_a_mesh_is_refused(pool: Pool) -> None:
    for outcome in pool.outcomes(attach_mesh, CASE):
        assert outcome.kind == "UnsupportedError", outcome
        assert "reduced over one rank of each sequence" in outcome.text


def train_on_a_mesh(case: Case) -> Weights:
    """Plain DeepSpeed, without ds_pso: each rank of a sequence trains on a part of it."""
    deepspeed.init_distributed("gloo")
    ds_config = config(sequence_case(case, 2, 2), 2)
    del ds_config["swarm"], ds_config["sequence_parallel_size"]
    torch.manual_seed(0)
    mesh = deepspeed.comm.initialize_mesh_device((1, 2), ("data_parallel", "sequence_parallel"))
    group = mesh.get_group(mesh_dim="sequence_parallel")
    model = Attends(group)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config, mesh_param=(1, 2)
    )
    for step in range(2):
        engine.backward(loss_of(engine, samples(0, step), group))
        engine.step()
    return working_weights(engine)


def test_on_a_mesh_the_ranks_of_a_sequence_drift_apart(pool: Pool) -> None:
    """The reason of the refusal: when this fails, DeepSpeed reduces gradients over them, and a mesh can be allowed."""
    first, second = pool.run(train_on_a_mesh, replace(CASE, particles=1), world_size=2)
    assert any((first[name] != second[name]).any() for name in first)


def attach_wrongly(case: Case, how: str) -> None:
    size = place(case)[2]
    keys = sequence_case(case, size, 2)
    if how == "key alone":
        with ds_pso.init(config(keys, size)) as swarm:
            engine, _ = build(case, swarm.ds_config, None)
            swarm.attach(engine)
    if how == "sampler of whole sequences":
        del keys.deepspeed["sequence_parallel_size"]
        with ds_pso.init(config(keys, size)) as swarm:
            swarm.sampler(range(40))
            engine, _ = build(case, swarm.ds_config, start_groups(2))
            swarm.attach(engine)
    if how == "three ranks":
        with ds_pso.init(config(replace(keys, deepspeed={"sequence_parallel_size": 3}), size)):
            pass


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("key alone", "sequence_parallel_size = 2: the engine divides sequences over 1 ranks"),
        ("sampler of whole sequences", "swarm.sampler was made for 4 ranks with samples of their own"),
        ("three ranks", "sequence_parallel_size = 3: does not divide the 2 ranks of a particle"),
    ],
)
def test_groups_that_do_not_fit(pool: Pool, how: str, text: str) -> None:
    for outcome in pool.outcomes(attach_wrongly, CASE, how):
        assert outcome.kind == "ConfigError", outcome
        assert text in outcome.text


@pytest.mark.parametrize("value", [0, -1, "2", 2.0, True])
def test_a_size_that_is_no_number_of_ranks(value: object) -> None:
    with pytest.raises(ConfigError, match=r"sequence_parallel_size = .*: must be a whole number of at least 1"):
        load_config({"swarm": {"particles": 2}, "sequence_parallel_size": value})


def test_a_mesh_in_the_config_is_refused_before_anything_is_built() -> None:
    section = {"particles": 2, "sync_mode": "local_sgd"}
    with pytest.raises(ConfigError, match="data_parallel_size = 1: with sequence_parallel_size"):
        load_config({"swarm": section, "sequence_parallel_size": 2, "data_parallel_size": 1})


def test_the_samplers_number_of_ranks() -> None:
    assert SwarmSampler(range(8), rank=0, world_size=2, batch_size=2).num_ranks == 2
