"""attach: equal starts, equal models, and a clear refusal of what the swarm cannot follow."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from torch import nn
from variants import slow_but

import ds_pso
from ds_pso.metrics.log import read_metrics

from .jobs import Case, Net, assert_equal, build_engine, build_model, config, place, swarm_of, train, working_weights

SCHEDULE = {"total_num_steps": 6, "warmup_max_lr": 0.01, "warmup_num_steps": 1, "decay_ratio": 0.5}


def around_attach(case: Case) -> Any:
    with swarm_of(case, attach=False) as (swarm, engine):
        engine.module.norm.running_mean.fill_(float(swarm.world.layout.rank))
        before = working_weights(engine)
        assert swarm.attach(engine) is engine
        return before, working_weights(engine)


@pytest.mark.parametrize("stage", slow_but([0, 3], [0, 1, 2, 3]))
def test_everybody_starts_as_particle_0(pool: Pool, stage: int) -> None:
    ranks = pool.run(around_attach, Case(stage=stage, batch_norm=True))
    assert (ranks[0][0]["last.weight"] != ranks[2][0]["last.weight"]).any(), "the seeds were to differ"
    for number, (_, after) in enumerate(ranks):
        expected = dict(ranks[0][0])
        expected["norm.running_mean"] = ranks[number % 2][0]["norm.running_mean"]  # of its peer in particle 0
        assert_equal(after, expected)


def leave_metrics(case: Case, folder: Path, resume: bool) -> None:
    with swarm_of(case, run_dir=folder) as (swarm, engine):
        if resume:
            swarm.load(folder / "checkpoints")
        train(case, engine, range(engine.global_steps, 3 + 3 * resume))
        if not resume:
            swarm.save(folder / "checkpoints")
            train(case, engine, range(3, 5))


def test_the_start_is_logged_and_again_when_it_is_resumed(pool: Pool, tmp_path: Path) -> None:
    all_partitioned = {"stage3_param_persistence_threshold": 0}
    schedule = {"type": "WarmupHoldDecayLR", "params": SCHEDULE}
    case = Case(stage=3, deepspeed={"scheduler": schedule, "zero_optimization": all_partitioned})
    pool.run(leave_metrics, case, tmp_path, False)
    pool.run(leave_metrics, case, tmp_path, True)
    records = read_metrics(tmp_path / "metrics.jsonl")
    found = [(record["event"], record["step"]) for record in records]
    assert found == [("start", 0), ("sync", 2), ("start", 3), ("sync", 4), ("sync", 6)]
    assert records[2]["time_s"] == records[1]["time_s"]
    for start in (records[0], records[2]):
        assert start["description"] == "2 particles x 2 ranks, local_sgd every 2 steps"
        numbers = [start[name] for name in ("particles", "ranks", "parameters", "zero_stage", "total_steps")]
        assert numbers == [2, 2, 69, 3, 6]
        assert (start["backend"], start["swarm"]["sync_interval"], start["swarm"]["delay"]) == ("gloo", 2, 0)
        assert start["versions"]["torch"] == torch.__version__


def average_buffers(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        engine.module.norm.running_mean.fill_(float(swarm.world.layout.rank))
        swarm.session.window.add(torch.tensor(float(swarm.particle)))
        swarm.sync()
        return float(engine.module.norm.running_mean[0])


@pytest.mark.parametrize(
    ("stage", "sync_mode"),
    slow_but([(0, "pso"), (3, "diloco")], [(s, mode) for s in (0, 3) for mode in ("local_sgd", "diloco", "pso")]),
)
def test_buffers_become_the_mean_of_the_peers(pool: Pool, stage: int, sync_mode: str) -> None:
    case = Case(stage=stage, batch_norm=True, sync_mode=sync_mode)
    assert pool.run(average_buffers, case) == [1.0, 2.0, 1.0, 2.0]  # ranks 0 and 2, ranks 1 and 3


def attach_other_model(case: Case, what: str) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        odd = swarm.particle == 1
        model: nn.Module = Net()
        case = replace(case, groups=2) if what == "groups" and odd else case
        if what == "shape" and odd:
            model.last = nn.Linear(5, 4)
        if what == "name" and odd:
            model.other, model.last = model.last, nn.Identity()
        if what == "buffer" and odd:
            model.register_buffer("statistics", torch.zeros(3))
        swarm.attach(build_engine(case, swarm.ds_config, model))


@pytest.mark.parametrize(
    ("stage", "what"),
    slow_but(
        [(1, "groups"), (2, "buffer")],
        [(0, "name"), (1, "groups"), (2, "shape"), (2, "name"), (2, "buffer"), (3, "shape")],
    ),
)
def test_different_models_are_an_error_everywhere(pool: Pool, stage: int, what: str) -> None:
    for outcome in pool.outcomes(attach_other_model, Case(stage=stage), what):
        assert outcome.kind == "SwarmError"
        assert "the model of particle 1" in outcome.text
        assert "is not that of particle 0" in outcome.text


def attach_wrongly(case: Case, how: str) -> None:
    with swarm_of(case, attach=False) as (swarm, engine):
        if how == "twice":
            swarm.attach(engine)
            swarm.attach(engine)
        if how == "no probe":
            swarm.attach(engine)


AUTO = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": 0.1}}}
SHORT = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1, "warmup_max_lr": 0.1}}}


@pytest.mark.parametrize(
    ("how", "case", "kind", "text"),
    [
        ("twice", Case(), "SwarmError", "attach was called twice"),
        ("no probe", Case(swarm={"fitness": "probe"}), "ConfigError", "give swarm.attach a probe"),
        ("no probe", Case(sync_mode="swarm"), "ConfigError", 'sync_mode = "swarm": it scores weights on a probe batch'),
        ("no probe", Case(sync_mode="line_search"), "ConfigError", "give swarm.attach a probe, or choose another mode"),
        (
            "",
            Case(sync_mode="nosync"),
            "ConfigError",
            "swarm.nosync changes over training, and its length is not known",
        ),
        (
            "",
            Case(sync_mode="pso", options={"final_social": 0.5}),
            "ConfigError",
            "set swarm.total_steps, or scheduler.params.total_num_steps",
        ),
        ("", Case(sync_mode="nosync", deepspeed=SHORT), "ConfigError", "no sync point falls in so short a training"),
        ("", Case(swarm={"total_steps": 1}), "ConfigError", "swarm.total_steps = 1: no sync point falls in"),
        (
            "",
            Case(sync_mode="nosync", options={"asynchronous": True, "growth": "constant"}, swarm={"fitness": "probe"}),
            "ConfigError",
            "particles that wait for nobody are not ranked",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attach_used_wrongly(pool: Pool, how: str, case: Case, kind: str, text: str) -> None:
    for outcome in pool.outcomes(attach_wrongly, case, how):
        assert (outcome.kind, text in outcome.text) == (kind, True), outcome


def attach_with_a_length_to_come(case: Case) -> None:
    """What the swarm was given says "auto", and what DeepSpeed was given says nothing."""
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        ds_config = {key: value for key, value in swarm.ds_config.items() if key != "scheduler"}
        swarm.attach(build_engine(case, ds_config))


def test_a_length_that_is_still_unknown_at_attach(pool: Pool) -> None:
    for outcome in pool.outcomes(attach_with_a_length_to_come, Case(sync_mode="nosync", deepspeed=AUTO)):
        assert outcome.kind == "ConfigError", outcome
        assert "scheduler.params.total_num_steps = None gives no sync point" in outcome.text


# -- what is refused --------------------------------------------------------------------------


def pretend(path: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute of the engine's ZeRO config: the feature itself does not start on a CPU."""

    def change(engine: Any) -> None:
        zero = engine._config.zero_config
        *parents, last = path.split(".")
        for parent in parents:
            zero = getattr(zero, parent)
        object.__setattr__(zero, last, value)

    return change


def pretend_engine(name: str, value: Any) -> Callable[[Any], None]:
    return lambda engine: setattr(engine, name, value)


def freeze_on_nvme(module: nn.Module) -> None:
    module.scale.requires_grad_(False)
    module.scale.ds_tensor.final_location = "nvme"


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
REFUSED: dict[str, tuple[Case, Callable[[Any], None], str]] = {
    "frozen on nvme": (Case(stage=3), lambda engine: freeze_on_nvme(engine.module), "not trained are on NVMe"),
    "super offload": (Case(stage=3, deepspeed=OFFLOAD), pretend("offload_optimizer.super_offload", True), "SuperOffl"),
    "zenflow": (Case(), pretend_engine("zenflow", True), "ZenFlow"),
    "quantised weights": (Case(stage=3), pretend("zero_quantized_weights", True), "zero_quantized_weights"),
    "deepcompile": (Case(stage=3), pretend_engine("is_deepcompile_enabled", lambda: True), "DeepCompile"),
    "AutoEP": (
        Case(),
        lambda engine: setattr(engine._config, "expert_parallel_config", SimpleNamespace(enabled=True)),
        "AutoEP makes one tensor of a rank's experts",
    ),
    "another mpu": (Case(), pretend_engine("mp_world_size", 2), "by an mpu of its own"),
    "unknown optimizer": (Case(stage=0), pretend_engine("optimizer", object()), "optimizer class object"),
}


def attach_refused(name: str) -> None:
    case, change, _ = REFUSED[name]
    with swarm_of(case, attach=False) as (swarm, engine):
        change(engine)
        swarm.attach(engine)


@pytest.mark.parametrize("name", slow_but(["AutoEP", "quantised weights", "unknown optimizer"], REFUSED))
def test_unsupported_features_are_refused(pool: Pool, name: str) -> None:
    for outcome in pool.outcomes(attach_refused, name):
        assert outcome.kind == "UnsupportedError", outcome
        assert REFUSED[name][2] in outcome.text


def attach_channels_last(case: Case) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine = build_engine(case, swarm.ds_config, nn.Sequential(nn.Conv2d(3, 4, 3)))
        engine.module.to(memory_format=torch.channels_last)
        swarm.attach(engine)


def attach_narrow(case: Case) -> None:
    """A model that was built in half precision, one of its layers at least, and a config that says nothing of it."""
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        model = build_model(case)
        model.last.to(torch.bfloat16)
        swarm.attach(build_engine(case, swarm.ds_config, model))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (attach_channels_last, "not contiguous"),
        (attach_narrow, "its master weights are torch.bfloat16, and sync points need fp32"),
    ],
)
def test_real_engines_that_are_refused(pool: Pool, body: Callable[[Case], None], text: str) -> None:
    for outcome in pool.outcomes(body, Case(stage=0)):
        assert (outcome.kind, text in outcome.text) == ("UnsupportedError", True), outcome


# -- particles = "node" -------------------------------------------------------------------------


def who_is_where(case: Case) -> Any:
    with ds_pso.init(config(case, 1)) as swarm:
        layout = swarm.world.layout
        inside = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        seen = [row[0] for row in swarm.session.exchange.all_gather([layout.particle])]
    return (layout.particle, layout.shard_rank), inside, seen, os.environ["WORLD_SIZE"]


@pytest.mark.parametrize("local", [1, 2, 4])
def test_each_node_is_a_particle(pool: Pool, local: int) -> None:
    def environment(rank: int) -> dict[str, str]:
        return {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local)}

    ranks = pool.run(who_is_where, Case(particles="node"), env=environment)
    for rank, (where, inside, seen, world_size_after) in enumerate(ranks):
        assert where == (rank // local, rank % local)
        assert inside == [rank % local, local, rank % local]
        np.testing.assert_array_equal(seen, range(4 // local))
        assert world_size_after == "4", "closing gives the launcher's environment back"


def both_particles_equal(case: Case) -> Any:
    with swarm_of(case) as (swarm, _):
        return swarm.particle


def test_particles_must_divide_the_ranks(pool: Pool) -> None:
    for outcome in pool.outcomes(both_particles_equal, Case(particles=3)):
        assert outcome.kind == "ConfigError"
        assert "does not divide the 4 ranks" in outcome.text
