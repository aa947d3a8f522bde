"""One particle whose rule acts without peers: an outer step every n steps, at every stage, and in a checkpoint."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from torch import nn
from variants import slow_but

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.export.offline import consolidate
from ds_pso.metrics.records import SyncRecord
from ds_pso.swarm import _cautions_for_one

from .jobs import (
    Case,
    Net,
    Weights,
    assert_close,
    assert_equal,
    build_engine,
    config,
    one_after_the_other,
    particle_batch,
    place,
    swarm_of,
    train,
    working_weights,
)
from .oracle import train_particles
from .test_reshape import assembled, at, load_all, of_the_engine, particle, saved
from .test_resume import BASE, STEPS, assert_same, job

SECTION = {"particles": 1, "sync_mode": "diloco", "wire": "int4", "delay": 2, "optimizer_state": "keep"}


def test_who_has_sync_points() -> None:
    for mode in (
        "allreduce",
        "local_sgd",
        "delayed",
        "diloco",
        "easgd",
        "noloco",
        "nosync",
        "pso",
        "swarm",
        "line_search",
    ):
        _, config = load_config({"swarm": {"particles": 2, "sync_mode": mode, "total_steps": 100}})
        assert config.has_sync_points(2) == (mode != "allreduce")
        assert config.has_sync_points(1) == (mode == "diloco")
    _, config = load_config({"swarm": SECTION})
    assert config.keys_for_peers() == ["wire", "delay"]
    alone = config.without_peers()
    assert (alone.wire, alone.delay, alone.keys_for_peers()) == ("fp32", 0, [])
    assert alone.build_rule().options == config.build_rule().options


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"particles": 1}, []),
        ({"particles": 1, "wire": "int4"}, []),
        ({}, ["is one particle: plain DeepSpeed, without sync points; give a number"]),
        ({"sync_mode": "allreduce"}, []),
        ({"sync_mode": "diloco"}, ["is one particle: diloco without peers; give a number"]),
        (SECTION, ["so these have no effect: swarm.wire, swarm.delay"]),
        ({**SECTION, "particles": "node"}, ["is one particle", "swarm.wire, swarm.delay"]),
    ],
)
def test_what_is_said_when_it_begins(section: dict[str, Any], said: list[str]) -> None:
    _, config = load_config({"swarm": section})
    found = list(_cautions_for_one(config))
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
CASE = Case(particles=1, sync_mode="diloco", interval=2, steps=8, options=OUTER)
CASES = {
    "outer step": CASE,
    "no momentum": replace(CASE, options={"outer_lr": 0.5, "outer_momentum": 0.0}),
    "lr 1": replace(CASE, options={"outer_lr": 1.0, "outer_momentum": 0.3}),
    "accumulation and groups": replace(CASE, accumulate=2, groups=2),
    "moments reset": replace(CASE, swarm={"optimizer_state": "reset"}),
}


def weights_of_each(cases: list[Case]) -> list[Weights]:
    found = []
    for case, _, engine in one_after_the_other(cases):
        train(case, engine)
        found.append(working_weights(engine))
    return found


def by_torch(case: Case) -> Weights:
    """The whole job in plain torch: AdamW inside, and torch's SGD with Nesterov momentum as the outer optimizer."""
    torch.manual_seed(100)
    model = Net()
    inner = torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.01)
    anchors = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    eta, mu = case.options["outer_lr"], case.options["outer_momentum"]
    outer = torch.optim.SGD(anchors, lr=eta, momentum=mu, nesterov=mu > 0)
    for step in range(case.steps):
        x, y = particle_batch(0, step)
        inner.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        inner.step()
        if (step + 1) % case.interval == 0:
            for anchor, p in zip(anchors, model.parameters(), strict=True):
                anchor.grad = anchor.detach() - p.detach()
            outer.step()
            for anchor, p in zip(anchors, model.parameters(), strict=True):
                p.data.copy_(anchor.detach())
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", slow_but([0, 3], [0, 1, 2, 3]))
def test_it_is_the_equation_and_the_outer_step_of_torch(pool: Pool, stage: int) -> None:
    """On two ranks; the equation in NumPy, and torch.optim.SGD(nesterov=True)."""
    cases = [replace(case, stage=stage) for case in CASES.values()]
    for rank in pool.run(weights_of_each, cases, world_size=2, timeout=120):
        for (name, case), weights in zip(CASES.items(), rank, strict=True):
            assert_close(weights, train_particles(case)[0])
            if name in ("outer step", "no momentum", "lr 1"):
                assert_close(weights, by_torch(case))


SAME = {
    "wire": replace(CASE, swarm={"wire": "int4", "residual_decay": 0.9}),
    "delay": replace(CASE, swarm={"delay": 2, "fragments": 2}),
    "streaming": replace(CASE, swarm={"delay": 1, "fragments": 2, "streaming": True}),
    "average": replace(CASE, swarm={"optimizer_state": "average"}),
    "merge": replace(CASE, options=OUTER | {"merge": "rda"}),
    "checksums": replace(CASE, swarm={"checksums": True, "bucket_mb": 1e-4}),
}


def with_warnings(cases: list[Case]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = weights_of_each(cases)
    return found, [str(warning.message) for warning in caught if "no effect" in str(warning.message)]


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_what_is_for_peers_is_ignored_and_said(pool: Pool, stage: int) -> None:
    cases = [replace(case, stage=stage) for case in (CASE, *SAME.values())]
    leader, other = pool.run(with_warnings, cases, world_size=2, timeout=120)
    for weights, said in (leader, other):
        for found in weights[1:]:
            assert_equal(found, weights[0])
        assert len(said) == (4 if said is leader[1] else 0)
    for text, keys in zip(
        leader[1],
        ("swarm.wire, swarm.residual_decay", "swarm.delay, swarm.fragments", "streaming", "optimizer_state"),
        strict=True,
    ):
        assert text.startswith("one particle has nobody to exchange with")
        assert text.endswith(keys)


def what_is_said_of_it(case: Case, folder: Path) -> Any:
    records: list[SyncRecord] = []
    with swarm_of(case, run_dir=folder / "run") as (swarm, engine):
        assert swarm.has_sync_points
        assert swarm.steps_to_sync == 2
        swarm.on_sync(records.append)
        train(case, engine)
        before = working_weights(engine)
        with swarm.consensus(), swarm.consensus("best"):
            inside = working_weights(engine)
        swarm.export(folder / "live")
        swarm.save(folder / "checkpoints")
        moved = swarm.total_bytes(), swarm.session.exchange.bytes_received
        swarm.merge()
        assert_equal(working_weights(engine), before)
        return swarm.describe(), records, moved, before, inside, swarm.last_losses


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_records_consensus_export_and_no_bytes(pool: Pool, tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file

    case = replace(CASE, stage=stage)
    ranks = pool.run(what_is_said_of_it, case, tmp_path, world_size=2)
    for described, records, moved, before, inside, losses in ranks:
        assert described == "1 particle x 2 ranks, diloco every 2 steps"
        assert [record.sync for record in records] == [0, 1, 2, 3]
        assert all(record.alive == (True,) and record.bytes_received == 0 for record in records)
        assert all(math.isnan(record.drift) and math.isfinite(record.losses[0]) for record in records)
        assert [dict(record.note) for record in records] == [
            {"outer_lr": 0.7, "outer_momentum": 0.9, "weights": (1.0,)}
        ] * 4
        assert moved == (0, 0)
        assert losses == records[-1].losses
        assert_equal(inside, before)
    weights = ranks[0][3]
    live = {name: t.numpy() for name, t in load_file(tmp_path / "live" / "model.safetensors").items()}
    assert_equal(live, weights)
    for which in ("consensus", "best", 0):
        found = consolidate(tmp_path / "checkpoints" / "step_00000008", which)
        assert_equal({name: t.numpy() for name, t in found.state_dict.items()}, weights)


# -- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_a_run_goes_on_bit_for_bit(pool: Pool, tmp_path: Path, stage: int) -> None:
    """Saved between two sync points; another seed shows that everything comes from the checkpoint."""
    case = replace(BASE, stage=stage, particles=1, sync_mode="diloco", options=OUTER)
    truth = pool.run(job, case, STEPS, tmp_path, 3, world_size=2)
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, tmp_path, None, world_size=2), truth)
    assert {key.split(".")[1] for key in truth[0]["rule"]} == {"anchor", "momentum"}


def save_with_the_engine(case: Case, folder: Path, stop: int | None, tag: str | None, begin: str) -> Any:
    """Weights and rule's state at the end; ``begin`` says how a run that was stopped goes on."""
    with warnings.catch_warnings(record=True) as caught, swarm_of(case) as (swarm, engine):
        warnings.simplefilter("always")
        first = 0
        if begin != "anew":
            path, _ = engine.load_checkpoint(str(folder), tag, load_module_only=begin == "weights")
            assert path is not None
            first = engine.global_steps
        train(case, engine, range(first, stop or case.steps))
        if stop is not None:
            engine.save_checkpoint(str(folder), tag)
        state = swarm.session.synchronizer.parts.updater.state
        kept = {f"{i}.{k}": v.float().numpy().copy() for i, s in enumerate(state) for k, v in s.items()}
        return working_weights(engine) | kept, [str(w.message) for w in caught if "engine." in str(w.message)]


@pytest.mark.parametrize(("stage", "tag"), slow_but([(3, None)], [(0, None), (2, "mine"), (3, None)]))
def test_the_engines_own_checkpoints(pool: Pool, tmp_path: Path, stage: int, tag: str | None) -> None:
    """They lie where DeepSpeed puts them, and a run goes on from them bit for bit."""
    case = replace(CASE, stage=stage, interval=3)
    expected = pool.run(save_with_the_engine, case, tmp_path / "none", None, None, "anew", world_size=2)
    pool.run(save_with_the_engine, case, tmp_path / "folder", 5, tag, "anew", world_size=2)
    assert not list(tmp_path.glob("folder/particle_*"))
    again = replace(case, seed=12345)
    found = pool.run(save_with_the_engine, again, tmp_path / "folder", None, tag, "resumed", world_size=2)
    for (one, said), (other, _) in zip(found, expected, strict=True):
        assert_equal(one, other)
        assert not said


def save_plainly(case: Case, folder: Path) -> None:
    ds_config = config(case, place(case)[2])
    del ds_config["swarm"]
    engine = build_engine(case, ds_config)
    train(case, engine, range(5))
    engine.save_checkpoint(str(folder))


def anchor_after_loading(case: Case, folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught, swarm_of(replace(case, seed=12345)) as (swarm, engine):
        warnings.simplefilter("always")
        engine.load_checkpoint(str(folder))
        parts = swarm.session.synchronizer.parts
        for x, state in zip(parts.shards.tensors, parts.updater.state, strict=True):
            assert torch.equal(state["anchor"], x)
            assert not state["momentum"].any()
        return engine.global_steps, [str(w.message) for w in caught if "engine." in str(w.message)]


def test_a_checkpoint_of_plain_deepspeed_is_a_new_beginning(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_plainly, CASE, tmp_path, world_size=2)
    (step, (said,)), other = pool.run(anchor_after_loading, CASE, tmp_path, world_size=2)
    assert step == 5
    assert "global_step5 holds nothing of the swarm: diloco begins anew, with the weights in it" in said
    assert other == (5, [])


def kept(rank: Any, number: int) -> dict[str, np.ndarray]:
    return assembled([r[number].pieces for r in rank])


RESHAPED = [
    Case(stage=2, sync_mode="diloco", options=OUTER),
    Case(stage=3, sync_mode="diloco", options=OUTER, swarm={"wire": "int8"}),
    Case(stage=0, sync_mode="diloco", options=OUTER, swarm={"delay": 1, "fragments": 2, "streaming": True}),
    Case(stage=2, sync_mode="diloco", options=OUTER, swarm={"delay": 2}),  # several have one pending
]


@pytest.mark.parametrize(("old", "new"), slow_but([((1, 2), (2, 1))], [((1, 2), (2, 1)), ((2, 1), (1, 2))]))
def test_on_another_number_of_particles_the_rule_goes_on(pool: Pool, tmp_path: Path, old: Any, new: Any) -> None:
    """Anchor and momentum are those of the particle that goes on; the wire of several begins with its weights."""
    before = saved(pool, RESHAPED, old, tmp_path)
    after = pool.run(load_all, at(RESHAPED, new, 12345), tmp_path, world_size=2, timeout=200)
    for number, case in enumerate(RESHAPED):
        was = kept(particle(before, 0, old[1]), number)
        for j in range(new[0]):
            now = kept(particle(after, j, new[1]), number)
            wire = {name: value for name, value in now.items() if name.startswith(("common", "residual"))}
            assert bool(wire) == ("wire" in case.swarm and new[0] > 1)
            rest = {name: value for name, value in now.items() if name not in wire}
            assert_equal(rest, {name: value for name, value in was.items() if name in rest})
            assert {name.split()[0] for name in rest} == {"x", "moment", "rule"}
            for name, value in wire.items():
                kind, parameter = name.split(" of ")
                np.testing.assert_array_equal(value, now[f"x of {parameter}"] if kind == "common" else 0 * value)
        for rank in after:
            assert rank[number].numbers["syncs"] == before[0][number].numbers["syncs"]
            later = of_the_engine(assembled([r[number].later for r in particle(after, 0, new[1])]))
            assert all(np.isfinite(value).all() for value in later.values())


# -- in one process, and without an outer step --------------------------------------------------


def simulated(case: Case) -> Weights:
    def life(swarm: Any) -> Weights:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        train(case, engine, where=(0, 0, 1))
        return working_weights(engine)

    (weights,) = ds_pso.simulate(config(case, 1), life)
    return weights


def real(case: Case) -> Weights:
    with swarm_of(case) as (_, engine):
        train(case, engine)
        return working_weights(engine)


def test_a_simulation_is_a_real_rank(pool: Pool) -> None:
    (expected,) = pool.run(real, CASE, world_size=1)
    (found,) = pool.run(simulated, CASE, world_size=1)
    assert_equal(found, expected)


def diverge_once(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        records: list[SyncRecord] = []
        swarm.on_sync(records.append)
        train(case, engine, range(3))
        tensor = swarm.session.synchronizer.parts.shards.tensors[0]
        tensor[0] = math.nan
        train(case, engine, range(3, 4))
        anchor = swarm.session.synchronizer.parts.updater.state[0]["anchor"]
        return [record.alive for record in records], bool(anchor.isfinite().all())


def test_the_anchor_survives_weights_that_are_not_finite(pool: Pool) -> None:
    for alive, is_finite in pool.run(diverge_once, CASE, world_size=2):
        assert alive == [(True,), (False,)]
        assert is_finite


def masked(case: Case) -> Any:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        model = Net()
        model.register_buffer("mask", torch.full((3,), -math.inf))
        engine = build_engine(case, swarm.ds_config, model)
        swarm.attach(engine)
        records: list[SyncRecord] = []
        swarm.on_sync(records.append)
        train(case, engine)
        return [record.alive for record in records]


def test_a_mask_of_infinities_is_no_divergence(pool: Pool) -> None:
    assert pool.run(masked, CASE, world_size=1) == [[(True,)] * 4]


def forget(case: Case, what: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with swarm_of(case, attach=what != "attach") as (_, engine):
            train(case, engine)
    return [str(w.message) for w in caught if "there was no sync point" in str(w.message)]


@pytest.mark.parametrize(("what", "text"), [("attach", "no engine was attached"), ("interval", "Lower it, or end")])
def test_an_outer_step_that_never_came_is_missed(pool: Pool, what: str, text: str) -> None:
    (said,), nothing = pool.run(forget, replace(CASE, interval=100), what, world_size=2)
    assert text in said
    assert nothing == []
