"""The swarm section of the JSON config: what is accepted, and what is said of everything else."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_pso.comm.compression.sparse_options import SparseOptions
from ds_pso.config.load import find_config, load_config, name_of, read_config
from ds_pso.config.presets import PRESETS, Preset, sync_modes
from ds_pso.config.schema import ALLREDUCE, SwarmConfig
from ds_pso.errors import ConfigError
from ds_pso.rules import RULES

ALL_KEYS = [*SwarmConfig.model_fields, *RULES]
NOT_A_NUMBER = 'must be a whole number of at least 1, or "node" for one particle per node'
A_MODE = f"must be one of {', '.join(sync_modes())}, or your own as my_module:MyRule"
LENGTH = {"nosync": {"total_steps": 320}}  # of training, for the rules that must know it


def load(section: Any) -> SwarmConfig:
    return load_config({"swarm": section})[1]


def message_of(source: Any) -> str:
    """The words of the ConfigError; they fill one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.agreed, "every rank reads the same file"
    return message


# -- what is accepted -----------------------------------------------------------------------


def test_defaults():
    config = load({})
    assert config.resolved() == {
        "particles": "node",
        "sync_mode": "local_sgd",
        "sync_interval": 32,
        "per_particle": [],
        "particle_weights": "samples",
        "schedule": {"type": "fixed", "warmup_steps": 0},
        "fitness": "train",
        "quarantine_loss": 4.0,
        "quarantine_norm": 10.0,
        "checksums": False,
        "delay": 0,
        "fragments": 1,
        "streaming": False,
        "mixing": 0.0,
        "state_device": "auto",
        "state_dtype": "fp32",
        "expert_load": False,
        "optimizer_state": "keep",
        "wire": "fp32",
        "residual": "wire",
        "residual_decay": 1.0,
        "total_steps": None,
        "bucket_mb": 64.0,
        "peer_backend": "auto",
        "transport": "static",
        "timeout_s": 600.0,
        "remote_checkpoints": None,
        "seed": 0,
        "local_sgd": {},
    }


def test_an_elastic_swarm_says_when_it_goes_on():
    section = load({"transport": "elastic", "elastic": {"min_particles": 2}}).resolved()
    assert section["elastic"] == {"min_particles": 2, "straggler": "wait", "straggler_s": 30.0, "heartbeat_s": 10.0}


def test_deepspeeds_part_comes_back_untouched_and_so_does_the_input():
    source = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}, "swarm": {"pso": {"social": 0.5}}}
    before = copy.deepcopy(source)
    ds_config, _ = load_config(source)
    assert ds_config == {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
    ds_config["zero_optimization"]["stage"] = 3
    assert source == before


@pytest.mark.parametrize("convert", [str, Path], ids=["str", "Path"])
def test_a_file_reads_like_a_mapping(tmp_path, convert):
    source = {"steps_per_print": 1, "swarm": {"particles": 4, "sync_mode": "pso", "pso": {"best": "all_time"}}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source), encoding="utf-8")
    (from_file, swarm_from_file), (from_mapping, swarm) = load_config(convert(path)), load_config(source)
    assert from_file == from_mapping
    assert swarm_from_file.resolved() == swarm.resolved()


@pytest.mark.parametrize("mode", [ALLREDUCE, *RULES])
def test_sync_mode_alone_chooses_the_rule(mode):
    section = {"sync_mode": mode, "seed": 7, "pso": {"social": 0.25}, "diloco": {"outer_lr": 0.1}}
    config = load(section | LENGTH.get(mode, {}))
    rule = config.build_rule()
    if mode == ALLREDUCE:
        assert rule is None
        assert config.rule_options is None
        return
    assert type(rule) is RULES[mode]
    assert rule.seed == 7
    options = {"pso": {"social": 0.25}, "diloco": {"outer_lr": 0.1}}.get(mode, {})
    assert rule.options == RULES[mode].Config(**options)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"sync_mode": ALLREDUCE},
        {"particles": 8, "sync_mode": "diloco", "diloco": {"outer_lr": 1, "outer_momentum": 0}},
        {"particles": "node", "sync_mode": "pso", "fitness": "probe", "pso": {"best": "all_time"}},
        {"optimizer_state": "average", "moments": {"first_every": 3, "second_every": 6, "wire": "int8"}},
        {"bucket_mb": 1, "timeout_s": 5, "seed": 3, "peer_backend": "gloo", "sync_interval": 1},
        {"sync_mode": "nosync", "total_steps": 320, "nosync": {"growth": "exponential"}, "optimizer_state": "reset"},
        {"sync_mode": "pso", "pso": {"constriction": True, "cognitive": 2.05, "social": 2.05, "velocity_clamp": 0.1}},
        {"sync_mode": "swarm", "swarm": {"guard": False, "lr_spread": 1, "fitness_steps": 1}},
    ],
)
def test_resolved_reads_back_as_the_same_config(section, tmp_path):
    resolved = load(section).resolved()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"swarm": resolved}), encoding="utf-8")
    again = load_config(path)[1]
    assert again.resolved() == resolved
    assert again.rule_options == load(section).rule_options


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("particles", 1),
        ("particles", "node"),
        ("sync_interval", 1),
        ("bucket_mb", 1e-6),
        ("bucket_mb", 4096),
        ("timeout_s", 0.1),
        ("seed", 2**70),
        ("pso", {"inertia": 0, "cognitive": 0, "social": 0}),
        ("diloco", {"outer_lr": 1e-9, "outer_momentum": 0}),
        ("easgd", {"beta": 1}),
        ("nosync", {"pressure": 0, "final_pressure": 0, "max_staleness": 0}),
        ("nosync", {"pressure": 1e-9, "final_pressure": 1e-9, "growth": "exponential"}),
        ("swarm", {"inertia": 0, "unequal_above": 1e-6, "lr_spread": 1, "lr_step": 0}),
        ("swarm", {"lr_spread": 10}),
        ("line_search", {"inertia": 1, "longest": 1e-9, "margin": 0}),
        ("pso", {"final_inertia": 0, "final_cognitive": 0, "final_social": 0}),
        ("pso", {"constriction": True, "cognitive": 2, "social": 2.0001}),
        ("pso", {"constriction": True, "cognitive": 0, "social": 5, "final_cognitive": 5, "final_social": 0}),
        ("total_steps", 32),  # one sync point
    ],
)
def test_the_edges_of_what_is_allowed(key, value):
    load({key: value})


# -- a bad value ----------------------------------------------------------------------------

BAD_VALUES = [
    *[("particles", value, NOT_A_NUMBER) for value in (0, -1, 2.0, True, "4", "nodes", None, [2], math.nan)],
    *[("sync_mode", value, A_MODE) for value in ("PSO", "ddp", "")],
    *[("sync_mode", value, "must be a valid string") for value in (3, None, True, ["pso"])],
    *[("sync_interval", value, "must be greater than or equal to 1") for value in (0, -32)],
    ("sync_interval", "Never", "must be a valid integer"),
    *[("sync_interval", value, "must be a valid integer") for value in (32.0, "32", True, None, math.nan)],
    *[("per_particle", value, "must be a valid list") for value in (8, None, "auto", {})],
    *[("particle_weights", value, "must be 'samples' or 'equal'") for value in ("tokens", None, 1)],
    ("checksums", 1, "must be a valid boolean"),
    ("quarantine_loss", 1, "must be greater than 1"),
    ("quarantine_loss", "4", "must be a valid number"),
    ("quarantine_norm", 0.5, "must be greater than 1"),
    ("quarantine_norm", math.inf, "must be a finite number"),
    *[("fitness", value, "must be 'train' or 'probe'") for value in ("loss", 1, None)],
    *[
        ("optimizer_state", value, "must be 'keep', 'average' or 'reset'")
        for value in ("mean", "", None, True, ["keep"])
    ],
    *[("schedule", value, "must be an object") for value in (3, "adaptive", None, [], True)],
    *[("transport", value, "must be 'static' or 'elastic'") for value in ("torchft", None, True, 1)],
    *[("elastic", value, "must be an object") for value in (True, "wait", None, [])],
    *[("moments", value, "must be an object") for value in (True, "int8", None, [3, 6])],
    ("delay", -1, "must be greater than or equal to 0"),
    *[("delay", value, "must be a valid integer") for value in (1.0, "1", True, None)],
    ("fragments", 0, "must be greater than or equal to 1"),
    *[("fragments", value, "must be a valid integer") for value in (2.0, "2", True, None)],
    *[("streaming", value, "must be a valid boolean") for value in (1, "true", None)],
    *[("mixing", value, "must be less than 1") for value in (1, 1.5)],
    ("mixing", -0.1, "must be greater than or equal to 0"),
    *[("state_device", value, "must be 'auto' or 'cpu'") for value in ("cuda", None, 0)],
    *[("state_dtype", value, "must be 'fp32' or 'bf16'") for value in ("fp16", None, 16)],
    *[("expert_load", value, "must be a valid boolean") for value in (1, "true", None)],
    *[("residual", value, "must be 'wire' or 'weights'") for value in ("none", None, 1)],
    *[("residual_decay", value, "must be greater than 0") for value in (0, -1)],
    ("residual_decay", 1.01, "must be less than or equal to 1"),
    *[
        ("wire", value, "must be 'fp32', 'bf16', 'int8', 'int4', 'e3m0', 'int2' or 'sparse'")
        for value in ("fp16", "INT8", "", 8, None)
    ],
    *[("total_steps", value, "must be greater than or equal to 1") for value in (0, -320)],
    *[("total_steps", value, "must be a valid integer") for value in (320.0, "320", True, math.inf)],
    *[("bucket_mb", value, "must be greater than 0") for value in (0, -1, 0.0)],
    ("bucket_mb", 4097, "must be less than or equal to 4096"),
    *[("bucket_mb", value, "must be a finite number") for value in (math.nan, math.inf, -math.inf)],
    *[("bucket_mb", value, "must be a valid number") for value in ("64", True, None)],
    *[("peer_backend", value, "must be 'auto', 'gloo' or 'nccl'") for value in ("mpi", None, 0)],
    *[("timeout_s", value, "must be greater than 0") for value in (0, -600)],
    *[("timeout_s", value, "must be a finite number") for value in (math.nan, math.inf)],
    *[("timeout_s", value, "must be a valid number") for value in ("600", True, None)],
    ("timeout_s", 1e300, "must be less than or equal to 10000000"),  # torch counts timeouts in int64 nanoseconds
    *[("remote_checkpoints", value, "must be a valid string") for value in (3, True, ["s3://bucket/run"])],
    *[
        (
            "remote_checkpoints",
            value,
            "must be an address that fsspec knows, such as s3://bucket/run or gs://bucket/run",
        )
        for value in ("", "bucket/run", "nosuch://bucket/run", "s3://")
    ],
    *[
        (
            "remote_checkpoints",
            value,
            "must hold none of * ? [, which fsspec would take for a pattern of several folders",
        )
        for value in ("s3://bucket/run[12]", "file:///runs/*/a", "gs://bucket/run?")
    ],
    ("seed", -1, "must be greater than or equal to 0"),
    *[("seed", value, "must be a valid integer") for value in (0.0, "0", True, None)],
]
BAD_OPTIONS = [
    *[
        ("diloco", "outer_lr", v, 'must be a number above 0, or "auto"')
        for v in (0, "0.7", math.nan, math.inf, None, True)
    ],
    *[("diloco", "merge", value, "must be 'mean' or 'rda'") for value in ("max", None, 1)],
    *[
        ("diloco", "outer_momentum", value, 'must be a number of at least 0 and below 1, or "auto"')
        for value in (1, -0.1, True, "0.9", math.nan)
    ],
    ("pso", "inertia", 1.0, "must be less than 1"),
    ("pso", "inertia", -0.5, "must be greater than or equal to 0"),
    ("pso", "cognitive", -1, "must be greater than or equal to 0"),
    ("pso", "social", math.inf, "must be a finite number"),
    ("pso", "social", None, "must be a valid number"),
    ("pso", "best", "global", "must be 'window' or 'all_time'"),
    ("pso", "randomness", False, "must be 'none', 'per_sync' or 'per_tensor'"),
    ("pso", "randomness", "per_element", "must be 'none', 'per_sync' or 'per_tensor'"),
    ("pso", "final_inertia", 1, "must be less than 1"),
    ("pso", "final_inertia", "0.4", "must be a valid number"),
    ("pso", "final_cognitive", -0.5, "must be greater than or equal to 0"),
    ("pso", "final_social", math.nan, "must be a finite number"),
    ("pso", "constriction", 1, "must be a valid boolean"),
    ("pso", "constriction", None, "must be a valid boolean"),
    ("pso", "velocity_clamp", 0, "must be greater than 0"),
    ("pso", "velocity_clamp", math.inf, "must be a finite number"),
    ("pso", "topology", "star", "must be 'global' or 'ring'"),
    ("easgd", "beta", 0, "must be greater than 0"),
    ("easgd", "beta", 1.1, "must be less than or equal to 1"),
    ("easgd", "beta", None, "must be a valid number"),
    ("noloco", "outer_lr", 0, "must be greater than 0"),
    ("noloco", "outer_momentum", 1, "must be less than 1"),
    ("nosync", "pressure", -0.1, "must be greater than or equal to 0"),
    ("nosync", "pressure", "high", "must be a valid number"),
    ("nosync", "final_pressure", 1.01, "must be less than or equal to 1"),
    ("nosync", "growth", "cosine", "must be 'linear', 'exponential' or 'constant'"),
    ("nosync", "asynchronous", "true", "must be a valid boolean"),
    ("nosync", "asynchronous", 1, "must be a valid boolean"),
    ("nosync", "max_staleness", -1, "must be greater than or equal to 0"),
    ("nosync", "max_staleness", None, "must be a valid integer"),
    ("nosync", "max_staleness", 4.0, "must be a valid integer"),
    ("swarm", "inertia", 1, "must be less than 1"),
    ("swarm", "guard", 0, "must be a valid boolean"),
    ("swarm", "fitness_steps", 0, "must be greater than or equal to 1"),
    ("swarm", "fitness_steps", 32.0, "must be a valid integer"),
    ("swarm", "temperature", 0, "must be greater than 0"),
    ("swarm", "unequal_above", 1, "must be less than 1"),
    ("swarm", "unequal_above", 0, "must be greater than 0"),
    ("swarm", "lr_spread", 0.9, "must be greater than or equal to 1"),
    ("swarm", "lr_spread", 11, "must be less than or equal to 10"),
    ("swarm", "lr_spread", math.inf, "must be a finite number"),
    ("swarm", "lr_step", -1, "must be greater than or equal to 0"),
    ("line_search", "inertia", 0, "must be greater than 0"),
    ("line_search", "inertia", 1.5, "must be less than or equal to 1"),
    ("line_search", "longest", 0, "must be greater than 0"),
    ("line_search", "margin", 1, "must be less than 1"),
    ("line_search", "margin", True, "must be a valid number"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_is_named_with_what_is_allowed(key, value, allowed):
    message = message_of({"swarm": {key: value}})
    assert message.startswith(f"config: swarm.{key} = {value!r}: {allowed}")


@pytest.mark.parametrize(("rule", "key", "value", "allowed"), BAD_OPTIONS)
def test_a_bad_option_of_a_rule_is_named_even_when_another_rule_is_active(rule, key, value, allowed):
    message = message_of({"swarm": {"sync_mode": ALLREDUCE, rule: {key: value}}})
    assert message.startswith(f"config: swarm.{rule}.{key} = {value!r}: {allowed}")


def test_bad_values_of_every_field_are_tried():
    assert {key for key, _, _ in BAD_VALUES} == set(SwarmConfig.model_fields)
    assert {(rule, key) for rule, key, _, _ in BAD_OPTIONS} == {
        (name, key) for name, rule in RULES.items() for key in rule.Config.model_fields
    }


BAD_MOMENTS = [
    *[("first_every", value, "must be greater than or equal to 1") for value in (0, -3)],
    *[("second_every", value, "must be a valid integer") for value in (2.0, "6", None, True)],
    *[("wire", value, "must be 'fp32', 'bf16', 'int8' or 'int4'") for value in ("int2", "sparse", None, 8)],
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_MOMENTS)
def test_a_bad_value_of_the_moments_is_named(key, value, allowed):
    message = message_of({"swarm": {"optimizer_state": "average", "moments": {key: value}}})
    assert message.startswith(f"config: swarm.moments.{key} = {value!r}: {allowed}")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"moments": {"second_every": 6}},
            'swarm.moments: with swarm.optimizer_state = "keep" no moments travel; remove it, or use "average"',
        ),
        (
            {"optimizer_state": "reset", "moments": {"wire": "int8"}},
            'swarm.moments: with swarm.optimizer_state = "reset" no moments travel; remove it, or use "average"',
        ),
        (
            {"optimizer_state": "average", "wire": "int4", "moments": {"second_every": 6}},
            'swarm.wire = "int4": with swarm.optimizer_state = "average" the moments would travel in fp32, and be more '
            'than what was saved; set swarm.moments.wire, or use "keep" or "reset"',
        ),
        (
            {
                "streaming": True,
                "fragments": 4,
                "delay": 2,
                "optimizer_state": "average",
                "moments": {"wire": "int8"},
            },
            'swarm.optimizer_state = "average": with swarm.streaming only a part of the model was synced; use "keep", '
            "or remove streaming",
        ),
    ],
)
def test_moments_that_the_rest_contradicts_are_refused(section, said):
    assert message_of({"swarm": section}) == f"config: {said}"


def test_moments_are_said_where_they_travel():
    assert "moments" not in load({}).resolved()
    section = {"optimizer_state": "average", "moments": {"first_every": 3}, "state_dtype": "fp32"}
    assert load(section).resolved()["moments"] == {"first_every": 3, "second_every": 1, "wire": "fp32"}
    assert load(section).keys_for_peers() == ["optimizer_state", "moments"]
    assert load(section).without_peers().moments == load({}).moments
    load({"optimizer_state": "average", "moments": {"wire": "int8"}, "state_dtype": "bf16", "state_device": "cpu"})


BAD_ELASTIC = [
    *[("min_particles", value, "must be greater than or equal to 1") for value in (0, -1)],
    *[("min_particles", value, "must be a valid integer") for value in (2.0, "2", None)],
    *[("straggler", value, "must be 'wait', 'skip' or 'async'") for value in ("drop", None, 3)],
    ("straggler_s", 0, "must be greater than 0"),
    ("straggler_s", math.inf, "must be a finite number"),
    ("heartbeat_s", 0.1, "must be greater than or equal to 0.5"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_ELASTIC)
def test_a_bad_value_of_the_elastic_section_is_named(key, value, allowed):
    message = message_of({"swarm": {"elastic": {key: value}}})
    assert message.startswith(f"config: swarm.elastic.{key} = {value!r}: {allowed}")


# -- keys that do not go together -----------------------------------------------------------

EXPONENTIAL = 'growth "exponential" needs pressure and final_pressure above 0, and they are '
FOUR = "constriction needs cognitive + social > 4 and they are "
FINAL_FOUR = "constriction needs final_cognitive + final_social > 4 and they are "
SETS_INERTIA = "constriction sets the inertia; remove inertia and final_inertia, or constriction"
CLERC = {"constriction": True, "cognitive": 2.05, "social": 2.05}


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("pso", CLERC | {"inertia": 0.5}, SETS_INERTIA),
        ("pso", CLERC | {"final_inertia": 0.5}, SETS_INERTIA),
        ("pso", {"constriction": True}, f"{FOUR}1; Clerc and Kennedy take 2.05 each"),
        ("pso", CLERC | {"cognitive": 1.95}, f"{FOUR}4; "),
        ("pso", CLERC | {"final_cognitive": 1, "final_social": 1}, f"{FINAL_FOUR}2; "),
        ("pso", CLERC | {"final_social": 0}, f"{FINAL_FOUR}2.05; "),
        ("pso", CLERC | {"final_cognitive": 0}, f"{FINAL_FOUR}2.05; "),
        ("nosync", {"growth": "exponential", "pressure": 0}, f"{EXPONENTIAL}0 and 1; raise them"),
        ("nosync", {"growth": "exponential", "final_pressure": 0}, f"{EXPONENTIAL}0.1 and 0; raise them"),
    ],
)
@pytest.mark.parametrize("active", [False, True], ids=["another rule is active", "active"])
def test_options_that_do_not_go_together_are_named(rule, options, said, active):
    section = {"sync_mode": rule if active else ALLREDUCE, "total_steps": 320, rule: options}
    assert message_of({"swarm": section}).startswith(f"config: swarm.{rule}: {said}")


PROGRESSIVE = [
    {"sync_mode": "nosync"},
    {"sync_mode": "nosync", "nosync": {"growth": "exponential"}},
    {"sync_mode": "nosync", "nosync": {"asynchronous": True}},
    *({"sync_mode": "pso", "pso": {f"final_{key}": 0}} for key in ("inertia", "cognitive", "social")),
]
NO_LENGTH = [
    {},
    {"scheduler": None},
    {"scheduler": 5},
    {"scheduler": "WarmupLR"},
    {"scheduler": []},
    {"scheduler": {}},
    {"scheduler": {"type": "WarmupLR"}},
    {"scheduler": {"params": None}},
    {"scheduler": {"params": 5}},
    {"scheduler": {"params": ["total_num_steps"]}},
    {"scheduler": {"params": {"warmup_num_steps": 5}}},
    {"scheduler": {"params": {"total_num_steps": None}}},
]


def schedule(steps: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": steps}}}


@pytest.mark.parametrize("section", PROGRESSIVE, ids=str)
@pytest.mark.parametrize("deepspeed", NO_LENGTH, ids=str)
def test_a_rule_that_changes_over_training_needs_its_length(section, deepspeed):
    assert message_of(deepspeed | {"swarm": section}) == (
        f"config: swarm.{section['sync_mode']} changes over training, and its length is not known; "
        "set swarm.total_steps, or scheduler.params.total_num_steps"
    )
    swarm = load_config(deepspeed | {"swarm": section | {"total_steps": 70}})[1]
    assert swarm.build_schedule(deepspeed).count == 2


@pytest.mark.parametrize("section", PROGRESSIVE, ids=str)
def test_the_schedulers_length_does_as_well(section):
    _, swarm = load_config(schedule(100) | {"swarm": section})
    assert swarm.build_schedule(schedule(100)).count == 3
    _, swarm = load_config(schedule(100) | {"swarm": section | {"total_steps": 64}})
    assert swarm.build_schedule(schedule(100)).count == 2, "the swarm section's own has precedence"
    _, swarm = load_config(schedule(5) | {"swarm": section | {"total_steps": 64}})
    assert swarm.build_schedule(schedule(5)).count == 2, "also where the scheduler's would be too short"


@pytest.mark.parametrize("section", PROGRESSIVE, ids=str)
@pytest.mark.parametrize("steps", [31, 0, -1])
def test_a_schedule_without_a_sync_point_is_refused(section, steps):
    assert message_of(schedule(steps) | {"swarm": section}) == (
        f"config: scheduler.params.total_num_steps = {steps}: no sync point falls in so short a training; "
        "lower swarm.sync_interval"
    )
    if steps > 0:
        load_config(schedule(steps) | {"swarm": section | {"sync_interval": steps}})


@pytest.mark.parametrize("mode", RULES)
def test_a_training_without_a_sync_point_is_refused_whatever_the_rule(mode):
    assert message_of({"swarm": {"sync_mode": mode, "sync_interval": 8, "total_steps": 7}}) == (
        "config: swarm.total_steps = 7: no sync point falls in so short a training; lower swarm.sync_interval"
    )
    assert load({"sync_mode": mode, "sync_interval": 8, "total_steps": 8}).build_schedule({}).count == 1


@pytest.mark.parametrize("deepspeed", [*NO_LENGTH, schedule(5), schedule("auto"), schedule([])], ids=str)
@pytest.mark.parametrize("section", [{"sync_mode": ALLREDUCE, "total_steps": 5}, {"sync_mode": "pso"}, {}], ids=str)
def test_who_needs_no_length_leaves_the_scheduler_to_deepspeed(deepspeed, section):
    ds_config, _ = load_config(deepspeed | {"swarm": section})
    assert ds_config == deepspeed


@pytest.mark.parametrize("steps", ["auto", 100.0, [100], {}, math.nan], ids=str)
def test_a_length_that_is_no_whole_number_is_left_to_deepspeed_and_counts_as_unknown(steps):
    ds_config, swarm = load_config(schedule(steps) | {"swarm": {"sync_mode": "nosync"}})
    assert swarm.build_schedule(ds_config).count is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer_state", "average", "particles that wait for nobody keep their own; use"),
        ("optimizer_state", "reset", "particles that wait for nobody keep their own; use"),
        ("fitness", "probe", "particles that wait for nobody are not ranked; use"),
    ],
)
def test_what_needs_all_particles_is_refused_where_nobody_waits(key, value, said):
    section = {"sync_mode": "nosync", "total_steps": 320, key: value}
    message = message_of({"swarm": section | {"nosync": {"asynchronous": True}}})
    assert message.startswith(f'config: swarm.{key} = "{value}": {said}')
    assert message.endswith("or set swarm.nosync.asynchronous to false")
    load(section | {"nosync": {"asynchronous": False}})
    load(section | {"sync_mode": "local_sgd", "nosync": {"asynchronous": True}})


def test_what_was_not_sent_is_not_kept_in_two_places():
    section = {"wire": "sparse", "delay": 4, "mixing": 0.5}
    message = message_of({"swarm": section})
    assert message.startswith('config: swarm.wire = "sparse": what it withholds waits in the wire, and with')
    assert message.endswith('set swarm.residual to "weights", or remove mixing')
    load(section | {"residual": "weights"})
    load(section | {"wire": "int4"})
    load(section | {"mixing": 0.0})


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {"delay": 4, "fragments": 4, "sync_interval": 8, "min_interval": 4}),
        ({"delay": 2}, {"delay": 2, "fragments": 2, "sync_interval": 8, "min_interval": 2}),
        ({"delay": 10}, {"delay": 10, "fragments": 4, "sync_interval": 20, "min_interval": 10}),
        ({"delay": 0}, {"delay": 0, "fragments": 1, "sync_interval": 8, "min_interval": 1}),
        (
            {"sync_interval": 64, "fragments": 1, "wire": "int4"},
            {"delay": 4, "fragments": 1, "sync_interval": 64, "min_interval": 4},
        ),
        (
            {"schedule": {"type": "fixed"}},
            {"delay": 4, "fragments": 4, "sync_interval": 8, "min_interval": 1},
        ),
    ],
)
def test_delayed_has_defaults_of_its_own(section, expected):
    swarm = load({"sync_mode": "delayed", **section})
    found = {key: getattr(swarm, key) for key in ("delay", "fragments", "sync_interval")}
    assert found | {"min_interval": swarm.schedule.min_interval} == expected
    assert swarm.schedule.type == section.get("schedule", {"type": "adaptive"})["type"]
    assert load({"sync_mode": "local_sgd", **section}).fragments == section.get("fragments", 1), "and only there"


@pytest.mark.parametrize("delay", [True, -1, "4", None, [4]])
def test_delayed_leaves_what_is_wrong_to_validation(delay):
    assert message_of({"swarm": {"sync_mode": "delayed", "delay": delay}}).startswith(
        f"config: swarm.delay = {delay!r}"
    )


def test_delayed_is_local_sgd_with_other_defaults():
    swarm = load({"sync_mode": "delayed", "delay": 2})
    assert swarm.sync_mode == "local_sgd"
    written_out = {
        "sync_mode": "local_sgd",
        "delay": 2,
        "fragments": 2,
        "sync_interval": 8,
        "schedule": {"type": "adaptive", "min_interval": 2},
    }
    assert swarm.resolved() == load(written_out).resolved() == load(swarm.resolved()).resolved()
    assert load({"sync_mode": "delayed", "delayed": {}}).resolved() == load({"sync_mode": "delayed"}).resolved()
    assert "swarm.delayed.part: unknown key" in message_of({"swarm": {"sync_mode": "delayed", "delayed": {"part": 1}}})


@pytest.mark.parametrize("mode", ["pso", "local_sgd", "allreduce", "delayed"])
def test_the_subsection_of_a_preset_stays_where_the_mode_is_another(mode):
    section = {"sync_mode": mode, "delayed": {}, "local_sgd": {}}
    assert load(section).resolved() == load({"sync_mode": mode, "local_sgd": {}}).resolved()
    assert "swarm.delayed.part: unknown key" in message_of({"swarm": section | {"delayed": {"part": 1}}})


def test_a_preset_is_added_by_one_line(monkeypatch):
    monkeypatch.setitem(PRESETS, "rare", Preset("diloco", lambda section: section.setdefault("sync_interval", 500)))
    assert sync_modes()[sync_modes().index("diloco") + 1] == "rare"
    swarm = load({"sync_mode": "rare", "rare": {"outer_lr": 0.5}})
    assert (swarm.sync_mode, swarm.sync_interval, swarm.rule_options.outer_lr) == ("diloco", 500, 0.5)
    assert load({"sync_mode": "rare", "sync_interval": 3}).sync_interval == 3
    assert "must be one of allreduce, local_sgd, delayed, diloco, rare, " in message_of({"swarm": {"sync_mode": "x"}})


ADAPTIVE = {"type": "adaptive"}
STREAMING = {"streaming": True, "fragments": 4, "delay": 2}
NO_NUMBER = "must be a valid number"


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"typ": "fixed"}, '.typ: unknown key; did you mean "type"?'),
        ({"type": "adapt"}, ".type = 'adapt': must be 'fixed', 'adaptive' or 'wall_time'"),
        ({"warmup_steps": -1}, ".warmup_steps = -1: must be greater than or equal to 0"),
        (ADAPTIVE | {"min_interval": 0}, ".min_interval = 0: must be greater than or equal to 1"),
        (ADAPTIVE | {"max_interval": 1.0}, ".max_interval = 1.0: must be a valid integer"),
        (ADAPTIVE | {"drift": 0}, ".drift = 0: must be greater than 0"),
        (ADAPTIVE | {"compute_share": 1}, ".compute_share = 1: must be less than 1"),
        ({"type": "wall_time", "seconds": "60"}, f".seconds = '60': {NO_NUMBER}"),
        (
            ADAPTIVE | {"min_interval": 64, "max_interval": 63},
            ": min_interval = 64 is more than max_interval = 63; lower it",
        ),
        ({"drift": 0.1}, ': "drift" has no meaning with "type": "fixed"; remove it'),
        (ADAPTIVE | {"seconds": 1.0}, ': "seconds" has no meaning with "type": "adaptive"; remove it'),
        ({"type": "wall_time", "drift": 0.1}, ': "drift" has no meaning with "type": "wall_time"; remove it'),
    ],
)
def test_a_bad_schedule_is_refused(schedule, said):
    assert message_of({"swarm": {"schedule": schedule}}) == f"config: swarm.schedule{said}"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"sync_interval": 4, "schedule": ADAPTIVE | {"min_interval": 5}},
            "swarm.sync_interval = 4: the interval begins there, and it must lie between swarm.schedule.min_interval = "
            "5 and max_interval = 1024",
        ),
        (
            {"sync_mode": "nosync", "total_steps": 9, "nosync": {"asynchronous": True}, "schedule": ADAPTIVE},
            'swarm.schedule.type = "adaptive": particles that wait for nobody cannot agree on an interval; '
            'use "fixed", or set swarm.nosync.asynchronous to false',
        ),
        (
            {"fragments": 2},
            "swarm.fragments = 2: at most one is applied after each step of swarm.delay = 0; lower it, or set a longer "
            "delay",
        ),
        (
            {"delay": 4, "fragments": 5},
            "swarm.fragments = 5: at most one is applied after each step of swarm.delay = 4; lower it, or set a longer "
            "delay",
        ),
        *[
            (
                {"streaming": True, **keys},
                "swarm.streaming = true: it spreads at least two fragments over the interval, each applied at least "
                f"one step late, and swarm.fragments = {keys.get('fragments', 1)}, swarm.delay = "
                f"{keys.get('delay', 0)}; raise them, or remove streaming",
            )
            for keys in ({}, {"delay": 2}, {"fragments": 2}, {"sync_interval": 1})
        ],
        (
            {**STREAMING, "schedule": ADAPTIVE},
            'swarm.schedule.type = "adaptive": swarm.streaming divides a fixed interval; use "fixed", or remove '
            "streaming",
        ),
        (
            {**STREAMING, "sync_interval": 6},
            "swarm.sync_interval = 6: swarm.streaming divides it by swarm.fragments = 4, and the rest is not 0; change "
            "one of them",
        ),
        (
            {**STREAMING, "sync_interval": 4, "total_steps": 9},
            "swarm.delay = 2: the next fragment would come first; use at most swarm.sync_interval / swarm.fragments = "
            "1, or lower fragments",
        ),
        *[
            (
                {**STREAMING, "optimizer_state": what},
                f'swarm.optimizer_state = "{what}": with swarm.streaming only a part of the model was synced; '
                'use "keep", or remove streaming',
            )
            for what in ("reset", "average")
        ],
        (
            {"state_device": "cpu"},
            'swarm.state_device = "cpu": with these options swarm.local_sgd keeps no state, nor does the wire "fp32"; '
            "remove the key",
        ),
        (
            {"sync_mode": "easgd", "state_dtype": "bf16"},
            'swarm.state_dtype = "bf16": with these options swarm.easgd keeps no state that may be rounded, nor does '
            'the wire "fp32"; remove the key',
        ),
        (
            {"delay": 2, "schedule": ADAPTIVE},
            "swarm.delay = 2: the next sync point would come first; use at most swarm.schedule.min_interval = 1, or "
            "raise that",
        ),
    ],
)
def test_a_schedule_that_the_rest_contradicts_is_refused(section, said):
    assert message_of({"swarm": section}) == f"config: {said}"


def test_a_varying_schedule_needs_no_interval_that_fits_into_training():
    load({"total_steps": 5, "schedule": ADAPTIVE})
    load({"total_steps": 5, "schedule": {"warmup_steps": 2}})
    load({"sync_mode": "nosync", "total_steps": 5, "schedule": {"type": "wall_time"}})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"delay": 33}, "swarm.delay = 33: the next sync point would come first; use at most swarm.sync_interval = 32"),
        (
            {"delay": 2, "sync_mode": "swarm"},
            "swarm.delay = 2: with these options swarm.swarm scores weights on a probe",
        ),
        ({"delay": 2, "sync_mode": "line_search"}, "swarm.delay = 2: with these options swarm.line_search scores"),
        (
            {"delay": 2, "sync_mode": "swarm", "swarm": {"guard": False}},
            "swarm.delay = 2: swarm.swarm compares learning rates, and they would change in the middle of an interval",
        ),
        (
            {"delay": 2, "sync_mode": "nosync", "total_steps": 64, "nosync": {"asynchronous": True}},
            "swarm.delay = 2: particles that wait for nobody have nothing to hide; use 0, or set swarm.nosync.asyn",
        ),
    ],
)
def test_what_cannot_go_on_in_the_background_is_refused(section, said):
    assert message_of({"swarm": section}).startswith(f"config: {said}")
    load(section | {"delay": 0})


@pytest.mark.parametrize(
    "section",
    [
        *({"sync_mode": mode} for mode in ("local_sgd", "diloco", "easgd", "nosync", "pso", ALLREDUCE)),
        {"sync_mode": "swarm", "swarm": {"guard": False, "lr_spread": 1}},
        {"sync_mode": "pso", "pso": {"topology": "ring"}},
        {"wire": "int4", "optimizer_state": "reset"},
        {"optimizer_state": "average"},
        {"wire": "int4", "optimizer_state": "average", "moments": {"wire": "int8", "second_every": 6}},
    ],
    ids=str,
)
@pytest.mark.parametrize("delay", [1, 32])
def test_the_others_may_be_late(section, delay):
    assert load(section | {"total_steps": 64, "delay": delay}).delay == delay


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4", "e3m0", "int2", "sparse"])
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sync_mode": "pso", "pso": {"topology": "ring"}}, "options of swarm.pso each particle receives something"),
        (
            {"sync_mode": "nosync", "total_steps": 64, "nosync": {"asynchronous": True}},
            "options of swarm.nosync each particle receives something else",
        ),
        ({"sync_mode": "noloco"}, "options of swarm.noloco each particle receives something else"),
        ({"optimizer_state": "average"}, 'swarm.optimizer_state = "average" the moments would travel in fp32'),
    ],
)
def test_what_cannot_travel_as_differences_is_refused(wire, section, said):
    message = message_of({"swarm": section | {"wire": wire}})
    assert message.startswith(f'config: swarm.wire = "{wire}": with ')
    assert said in message
    load(section | {"wire": "fp32"})


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "int4", "e3m0", "int2"])
@pytest.mark.parametrize("mode", [*(mode for mode in RULES if mode != "noloco"), ALLREDUCE])
def test_every_mode_but_pairs_travels_in_every_format(wire, mode):
    assert load({"sync_mode": mode, "total_steps": 64, "wire": wire, "optimizer_state": "reset"}).wire == wire


# -- a wire with options --------------------------------------------------------------------


def test_options_of_a_wire():
    swarm = load({"wire": "sparse", "sparse": {"density": 0.004, "bits": 1}})
    assert swarm.wire_options == SparseOptions(density=0.004, bits=1)
    assert swarm.resolved()["sparse"] == {"density": 0.004, "bits": 1}
    assert load({"wire": "sparse"}).wire_options == SparseOptions()
    other = load({"wire": "int4", "sparse": {"bits": 16}})
    assert other.wire_options is None
    assert other.options_of("sparse") == SparseOptions(bits=16)
    assert "sparse" not in other.resolved()


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("density", 0, "must be greater than 0"),
        ("density", 0.51, "must be less than or equal to 0.5"),
        ("density", math.nan, "must be a finite number"),
        ("bits", 3, "must be 1, 2 or 16"),
        ("bits", None, "must be 1, 2 or 16"),
    ],
)
def test_a_bad_option_of_a_wire_is_named_even_when_another_is_active(key, value, allowed):
    assert message_of({"swarm": {"sparse": {key: value}}}).startswith(
        f"config: swarm.sparse.{key} = {value!r}: {allowed}"
    )


def test_an_unknown_option_of_a_wire():
    assert message_of({"swarm": {"sparse": {"densty": 1}}}).startswith(
        'config: swarm.sparse.densty: unknown key; did you mean "density"?'
    )
    assert message_of({"swarm": {"sparse": 3}}) == "config: swarm.sparse = 3: must be an object"


@pytest.mark.parametrize("mode", [mode for mode in RULES if mode not in ("local_sgd", "diloco", "noloco")])
@pytest.mark.parametrize(
    ("section", "said"),
    [({"wire": "sparse"}, 'swarm.wire = "sparse": '), ({"wire": "int4", "residual": "weights"}, "swarm.residual = ")],
)
def test_what_needs_one_mean_is_refused_to_rules_that_have_more(mode, section, said):
    message = message_of({"swarm": {"sync_mode": mode, "total_steps": 64, **section}})
    assert message.startswith(f"config: {said}")
    assert 'the sync_mode "local_sgd" or "diloco"' in message
    for good in ("local_sgd", "diloco", "delayed"):
        load({"sync_mode": good, **section})


@pytest.mark.parametrize(
    "section",
    [
        {"residual": "weights"},
        {"residual_decay": 0.9},
        {"residual_decay": 0.9, "wire": "int4", "residual": "weights"},
    ],
)
def test_a_residual_that_there_is_not_is_refused(section):
    assert message_of({"swarm": section}).startswith("config: swarm.residual")
    load({"wire": "sparse", "residual_decay": 0.9})


def test_all_mistakes_of_a_section_are_said_at_once():
    message = message_of({"swarm": {"particles": 0, "sync_interval": 0}})
    assert "swarm.particles = 0" in message
    assert "swarm.sync_interval = 0" in message


# -- experts --------------------------------------------------------------------------------


def test_particles_may_never_sync():
    config = {"scheduler": {"params": {"total_num_steps": 100}}, "swarm": {"particles": 2, "sync_interval": "never"}}
    config["swarm"]["total_steps"] = 100
    ds_config, swarm = load_config(config)
    schedule = swarm.build_schedule(ds_config)
    assert not any(schedule.is_due(step) for step in (1, 32, 100, 2**40))
    assert swarm.resolved()["sync_interval"] == "never"
    assert load(swarm.resolved()) == swarm


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"schedule": {"type": "adaptive"}}, 'swarm.schedule.type = "adaptive" has nothing to vary; set a number'),
        ({"delay": 2}, "swarm.delay = 2, and there is nothing to come late; set a number, or remove the delay"),
        ({"sync_mode": "nosync", "total_steps": 64}, "options swarm.nosync changes from one sync point to the next"),
    ],
)
def test_what_needs_sync_points_is_refused_without_any(section, said):
    assert said in message_of({"swarm": {"sync_interval": "never", **section}})


# -- batches of their own -------------------------------------------------------------------


def test_what_an_entry_does_not_say_is_that_of_all():
    section = {"particles": 2, "per_particle": [{"train_micro_batch_size_per_gpu": 8}, {}]}
    _, swarm = load_config({"train_micro_batch_size_per_gpu": 4, "swarm": section})
    assert [entry.model_dump() for entry in swarm.per_particle] == [
        {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1},
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
    ]
    assert [entry.samples_of_a_rank for entry in swarm.per_particle] == [8, 4]
    accumulating = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 3}
    section["per_particle"] = [{"train_micro_batch_size_per_gpu": 8}, {"train_micro_batch_size_per_gpu": 2}]
    _, swarm = load_config(accumulating | {"swarm": section})
    assert [entry.samples_of_a_rank for entry in swarm.per_particle] == [24, 6]


ONE, OTHER = {"train_micro_batch_size_per_gpu": 8}, {"train_micro_batch_size_per_gpu": 4}


@pytest.mark.parametrize(
    ("section", "others", "said"),
    [
        ({"per_particle": [ONE]}, {}, "swarm: per_particle has 1 entries, and particles = 2; give a number of"),
        ({"particles": "node", "per_particle": [ONE]}, {}, "per_particle has 1 entries, and particles = 'node'; give"),
        ({"sync_mode": "allreduce", "per_particle": [ONE, OTHER]}, {}, 'per_particle: "allreduce" makes all ranks one'),
        ({"per_particle": [ONE, {"lr": 1}]}, {}, "swarm.per_particle[1].lr: unknown key; known keys: train_micro_"),
        (
            {"per_particle": [ONE, {"gradient_accumulation_steps": 0}]},
            {},
            "per_particle[1].gradient_accumulation_steps",
        ),
        ({"per_particle": [ONE, 8]}, {}, "swarm.per_particle[1] = 8: must be an object"),
        ({"per_particle": ONE}, {}, "swarm.per_particle = {'train_micro_batch_size_per_gpu': 8}: must be a valid list"),
        ({"per_particle": [ONE, OTHER]}, {"train_batch_size": 12}, "train_batch_size = 12: with swarm.per_particle"),
        ({"per_particle": [ONE, {}]}, {}, '"train_micro_batch_size_per_gpu" is no number of at least 1 for some; give'),
        ({"per_particle": [ONE, {}]}, {"train_micro_batch_size_per_gpu": 0}, "is no number of at least 1 for some"),
        (
            {"per_particle": [ONE, OTHER]},
            {"gradient_accumulation_steps": "auto"},
            '"gradient_accumulation_steps" is no number of at least 1 for some; give it in each entry, or once',
        ),
        (
            {"per_particle": [ONE, OTHER], "transport": "elastic"},
            {},
            'swarm.transport = "elastic": a particle that recovers',
        ),
    ],
)
def test_batches_that_cannot_be_are_refused(section, others, said):
    assert said in message_of(others | {"swarm": {"particles": 2, **section}})


# -- a bad key, or no object ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"partcles": 2}, 'swarm.partcles: unknown key; did you mean "particles"?'),
        ({"SyncMode": "pso", "particles": 2}, "swarm.SyncMode: unknown key;"),
        ({"dilco": {}}, 'swarm.dilco: unknown key; did you mean "diloco"?'),
        ({"pso": {"inertai": 0.5}}, 'swarm.pso.inertai: unknown key; did you mean "inertia"?'),
        ({"local_sgd": {"momentum": 0.9}}, "swarm.local_sgd.momentum: unknown key; known keys:"),
        ({"xyzzy": 1}, f"swarm.xyzzy: unknown key; known keys: {', '.join(ALL_KEYS)}"),
        ({"_rule_options": {}}, "swarm._rule_options: unknown key"),
        ({"pso": 5}, "swarm.pso = 5: must be an object"),
        ({"pso": None}, "swarm.pso = None: must be an object"),
        ({"diloco": [1]}, "swarm.diloco = [1]: must be an object"),
        (5, "swarm = 5: must be an object"),
        ([], "swarm = []: must be an object"),
        ("pso", "swarm = 'pso': must be an object"),
    ],
)
def test_a_bad_key_or_shape_is_named(section, said):
    assert said in message_of({"swarm": section})


@pytest.mark.parametrize("source", [{}, {"swarm": None}, {"zero_optimization": {"stage": 3}}])
def test_a_missing_section_comes_with_an_example(source):
    assert message_of(source).startswith('config: no "swarm" section; add one, such as "swarm": {"particles": 2')


# -- a bad file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"swarm": {"particles": 2, "particles": 4}}', 'the key "particles" stands twice; remove one'),
        ('{"swarm": {}, "swarm": {}}', 'the key "swarm" stands twice; remove one'),
        ('{\n  "swarm": {"particles": }\n}', "line 2, column 26: Expecting value"),
        ('{\n  "swarm" 1\n}', "line 2, column 11: Expecting ':' delimiter"),
        ("", "line 1, column 1: Expecting value"),
        ("[]", "the DeepSpeed config must be a JSON object"),
        ('"swarm"', "the DeepSpeed config must be a JSON object"),
        ('{"zero_optimization": {}}', 'no "swarm" section'),
        ('{"swarm": {"bucket_mb": NaN}}', "swarm.bucket_mb = nan: must be a finite number"),
        (b'{"swarm": "\xff\xfe"}', "not a UTF-8 text file; the DeepSpeed config must be JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.json", "cannot read the DeepSpeed config (No such file or directory); check the path"),
        (".", "cannot read the DeepSpeed config (Is a directory); check the path"),
    ],
)
def test_a_path_that_is_no_file(tmp_path, name, said):
    assert said in message_of(tmp_path / name)


# -- what DeepSpeed and Accelerate read -----------------------------------------------------

READ = {"train_batch_size": 2, "swarm": {"particles": 1, "sync_mode": "diloco"}}
PLAIN = json.dumps(READ)
TEXTS = {
    "plain": PLAIN,
    "comments": '{\n  // per GPU\n  "train_batch_size": 2, # two\n  /* here */ "swarm": '
    '{"particles": 1, "sync_mode": "diloco"}\n}',
    "trailing commas": '{"train_batch_size": 2, "swarm": {"particles": 1, "sync_mode": "diloco",},}',
    "no quotes": "{train_batch_size: 2\nswarm: {particles: 1\nsync_mode: diloco\n}}",
    "byte-order mark": "\ufeff" + PLAIN,
    "both": "\ufeff# mine\n" + PLAIN,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_files_are_read_as_deepspeed_reads_them(tmp_path, text):
    from deepspeed.runtime.config import hjson

    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert read_config(path) == read_config(str(path)) == READ == hjson.loads(text)
    assert load_config(path)[1].sync_mode == "diloco"


def base64_of(text):
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize("source", [PLAIN, "\n " + PLAIN, *(base64_of(text) for text in TEXTS.values())])
def test_the_text_itself_is_read_as_well(source):
    assert read_config(source) == READ
    assert load_config(source)[0] == {"train_batch_size": 2}
    assert name_of(source) == "config"


@pytest.mark.parametrize("config", [{"a": 1}, {"swarm": {"particels": 2}}, {"swarm": {"particles": 2, "wire": "?"}}])
def test_what_is_wrong_with_a_text_does_not_repeat_it(config):
    for source in (json.dumps(config), base64_of(json.dumps(config))):
        message = message_of(source)
        assert message.startswith("config: ")
        assert source not in message


@pytest.mark.parametrize("source", ["nowhere.json", "configs/zero2", "abcd", "e30", "a/b", "x" * 5000, "/nowhere/{}"])
def test_what_is_neither_is_a_path_that_is_not_there(source):
    assert message_of(source).startswith(f"{source}: cannot read the DeepSpeed config (")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{# one\n"swarm": {"particles": 2, "particles": 4}}', 'the key "particles" stands twice; remove one'),
        ('{\n  # two\n  "swarm" 1\n}', "line 3, column 11: Expecting ':' delimiter"),
        ("{/* three", "line 1, column 2: Expecting property name"),
        (" \n", "line 2, column 1: Expecting value"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{# four\n"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": ' + "[" * 100_000 + "}", "too many brackets inside one another"),
        ('{# five\n"a": ' + "[" * 100_000 + "}", "too many brackets inside one another"),
        ('\0\0{"swarm": {}}', "line 1, column 1: Expecting value"),
    ],
    ids=lambda value: value[:20],
)
def test_what_nobody_reads_is_named_with_the_place(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert said in message


@given(st.text(alphabet="{}[],:#/*\"'1a \n\\") | st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_config_or_refused_in_one_line(text):
    for source in ("{" + text, base64_of(text), text):
        with contextlib.suppress(ConfigError):  # which has no line breaks
            assert isinstance(read_config(source), dict)


def test_json_needs_no_hjson():
    code = "import sys, ds_pso.config.load as l; l.load_config(sys.argv[1]); print('hjson' in sys.modules)"
    for text, needed in ((PLAIN, "False"), (TEXTS["comments"], "True")):
        done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == needed


# -- anything at all ------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(ALL_KEYS)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
option_keys = sorted({key for rule in RULES.values() for key in rule.Config.model_fields})
options = st.dictionaries(st.sampled_from(option_keys), st.floats(0, 1) | values, max_size=2)
sections = st.dictionaries(
    st.sampled_from(ALL_KEYS) | st.text(max_size=5), values | options | st.integers(1, 9), max_size=3
)


lengths = st.fixed_dictionaries({}, optional={"total_num_steps": values | st.integers(1, 99)})
schedulers = st.fixed_dictionaries({}, optional={"params": values | lengths})
deepspeeds = st.fixed_dictionaries({}, optional={"scheduler": values | schedulers})


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(sections | values, deepspeeds)
def test_any_json_is_accepted_or_refused_in_one_line(section, deepspeed):
    try:
        ds_config, config = load_config(deepspeed | {"swarm": section})
    except ConfigError:
        assert "swarm" in message_of(deepspeed | {"swarm": section})
    else:
        again = load_config(deepspeed | {"swarm": config.resolved()})[1]
        assert again.resolved() == config.resolved()
        assert again.build_schedule(ds_config).count == config.build_schedule(ds_config).count
        config.build_rule()


# -- which file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--deepspeed_config", "a.json"], "a.json"),
        (["--steps", "3", "--deepspeed_config=a.json"], "a.json"),
        (["--deepspeed", "a.json", "--bf16"], "a.json"),
        (["--deepspeed", "--deepspeed_config", "a.json"], "a.json"),
        (["--deepspeed_config", "a.json", "--deepspeed"], "a.json"),
        (["--deepspeed_config", "a.json", "--deepspeed", "text.txt"], "a.json"),
        (["--deepspeed_config", "a.json", "--deepspeed_config", "b.json"], "b.json"),
        ([], "launch.json"),
        (["--deepspeed_config_files", "a.json"], "launch.json"),
    ],
)
def test_the_json_is_the_one_that_the_tool_names(monkeypatch, arguments, found):
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "launch.json")
    assert find_config() == found


@pytest.mark.parametrize(
    "environment", [{}, {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_DEEPSPEED": "false"}]
)
@pytest.mark.parametrize("file", [None, "none", "a.json"])
def test_a_json_that_nobody_names_is_an_error(monkeypatch, environment, file):
    monkeypatch.setattr("sys.argv", ["deepspeed_config", "--steps", "3"])
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": file} if file else {})).items():
        monkeypatch.setenv(name, value)
    if file == "a.json" and environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        assert find_config() == file
    else:
        with pytest.raises(ConfigError, match="--deepspeed_config on the command line"):
            find_config()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"delay": 4, "fragments": 2}, "swarm.fragments = 2 are applied one after the other; set it to 1"),
        ({"sync_mode": "delayed"}, "swarm.fragments = 4 are applied one after the other; set it to 1"),
        (
            {"sync_mode": "nosync", "total_steps": 64, "nosync": {"asynchronous": True}},
            "set swarm.nosync.asynchronous to false",
        ),
        ({"peer_backend": "nccl"}, 'set swarm.peer_backend to "gloo" or "auto"'),
        ({"sync_mode": "diloco", "elastic": {"straggler": "async"}}, 'use "skip" or "wait"'),
        ({"wire": "int8", "elastic": {"straggler": "async"}}, 'use "skip" or "wait"'),
    ],
)
def test_what_an_elastic_swarm_cannot_do_is_refused(section, said):
    assert said in message_of({"swarm": {"transport": "elastic", **section}})
    section.pop("elastic", None)
    load(section)  # the static one can


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"delay": 1}, "swarm.delay = 1: swarm.diloco.merge"),
        ({"wire": "sparse"}, 'swarm.wire = "sparse": swarm.diloco.merge'),
        ({"wire": "int4", "residual": "weights"}, 'swarm.residual = "weights": swarm.diloco.merge'),
    ],
)
def test_a_merge_that_needs_whole_movements_is_refused_where_there_are_none(section, said):
    assert message_of({"swarm": {"sync_mode": "diloco", "diloco": {"merge": "rda"}, **section}}).startswith(
        f"config: {said}"
    )
    load({"sync_mode": "diloco", **section})
    load({"sync_mode": "diloco", "diloco": {"merge": "rda"}, "wire": "int4"})
