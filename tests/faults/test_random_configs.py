"""Configs drawn at random, good and bad: each trains, or is refused in one line that names what is wrong."""

from __future__ import annotations

import copy
import math
import re
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import Pool
from torch import nn

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.config.schema import SwarmConfig
from ds_pso.errors import ConfigError, SwarmError
from ds_pso.rules import RULES

PACKAGE = str(Path(ds_pso.__file__).parent)
PARTICLES, STEPS = 2, 4
ONE_LINE = re.compile(r"[^\n]+")

# Values that no key is meant to have, and some that a few allow.
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 10**30, -(10**400), 10**400, 1e308, -0.5, math.nan, math.inf, "", "2", "auto", "müll\n"]),
    st.recursive(
        st.sampled_from([1, "x", None, {}]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "stage", "type"]), inner),
        max_leaves=4,
    ),
)
VALID: dict[str, Any] = {
    "sync_interval": st.sampled_from([1, 2, 4]),
    "schedule": st.sampled_from(
        [{}, {"warmup_steps": 2}, {"type": "adaptive", "compute_share": 0}, {"type": "wall_time", "seconds": 0.01}]
    ),
    "delay": st.sampled_from([0, 1, 2]),
    "fragments": st.sampled_from([1, 2]),
    "streaming": st.booleans(),
    "fitness": st.sampled_from(["train", "probe"]),
    "quarantine_loss": st.sampled_from([None, 1.5, 4]),
    "quarantine_norm": st.sampled_from([None, 2.0]),
    "optimizer_state": st.sampled_from(["keep", "average", "reset"]),
    "moments": st.sampled_from([{}, {"second_every": 2}, {"first_every": 2, "wire": "int8"}]),
    "total_steps": st.sampled_from([None, STEPS, 100]),
    "wire": st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    "state_device": st.sampled_from(["auto", "cpu"]),
    "state_dtype": st.sampled_from(["fp32", "bf16"]),
    "bucket_mb": st.sampled_from([1e-4, 64, 4096]),
    "checksums": st.booleans(),
    "peer_backend": st.sampled_from(["auto", "gloo"]),
    "timeout_s": st.sampled_from([20, 600.0]),
    "seed": st.sampled_from([0, 7, 2**63]),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "local_sgd": [{}],
    "diloco": [{}, {"outer_lr": 1, "outer_momentum": 0}],
    "easgd": [{}],
    "noloco": [{}],
    "nosync": [{}, {"growth": "constant"}, {"asynchronous": True, "growth": "constant"}],
    "pso": [
        {},
        {"inertia": 0.3, "cognitive": 0.5, "best": "all_time"},
        {"topology": "ring", "randomness": "per_tensor"},
    ],
    "swarm": [{}, {"guard": False, "lr_spread": 1}, {"inertia": 0.5}],
    "line_search": [{}],
}
GOOD: dict[str, list[Any]] = {
    "train_micro_batch_size_per_gpu": [1, 2],
    "gradient_accumulation_steps": [1, 2],
    "gradient_clipping": [0, 1.0],
    "zero_optimization": [{}, *({"stage": stage} for stage in range(4))],
    "bf16": [{"enabled": True}, {"enabled": False}],
    "optimizer": [
        {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    ],
    "scheduler": [
        {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 1}},
        {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01}},
        {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": "many"}},  # ds_pso's own, which it refuses itself
        {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": STEPS, "decay_ratio": "half"}},
    ],
    "zero_allow_untested_optimizer": [True],
    "zero_force_ds_cpu_optimizer": [False],
}
ALWAYS = ("train_micro_batch_size_per_gpu", "optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """A good config, to which bad things may have happened."""
    mode = draw(st.sampled_from(list(RULES)))
    section = {"particles": PARTICLES, "sync_mode": mode, "sync_interval": 2}
    for key in draw(st.lists(st.sampled_from(list(VALID)), max_size=5, unique=True)):
        section[key] = draw(VALID[key])
    if draw(st.booleans()):
        section[mode] = dict(draw(st.sampled_from(OPTIONS[mode])))
    config: dict[str, Any] = {}
    for key in {*ALWAYS, *draw(st.lists(st.sampled_from(list(GOOD)), max_size=5))}:
        config[key] = copy.deepcopy(draw(st.sampled_from(GOOD[key])))
    config["swarm"] = section
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        where = draw(st.sampled_from(["value", "value", "key", "option", "section", "deepspeed"]))
        if where == "value":
            section[draw(st.sampled_from(sorted(SwarmConfig.model_fields)))] = draw(junk)
        elif where == "key":
            section[draw(st.sampled_from(["particels", "stage", "", "pso ", "lr"]))] = draw(junk)
        elif where == "option":
            name = draw(st.sampled_from(list(RULES)))
            options = [*RULES[name].Config.model_fields, "unknown"]
            section[name] = {draw(st.sampled_from(options)): draw(junk)}
        elif where == "section":
            section[draw(st.sampled_from([*RULES, "schedule"]))] = draw(junk)
        else:
            config[draw(st.sampled_from(list(GOOD)))] = draw(junk)
    return config


def is_spoilt(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed's part holds what none of the good ones does."""
    return not all(value in GOOD[key] for key, value in config.items() if key != "swarm")


def refusal(config: dict[str, Any]) -> str | None:
    """What is said before anything is started; None if nothing is."""
    before = copy.deepcopy(config)
    try:
        load_config(config)
    except ConfigError as error:
        return str(error)
    finally:
        assert repr(config) == repr(before), "the script's own dict is left alone"
    return None


def assert_says_what_is_wrong(message: str) -> None:
    assert ONE_LINE.fullmatch(message), message
    assert re.match(r"config: (swarm|scheduler)\b", message), message


@given(configs())
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_wrong_with_the_section_is_said_at_once(config: dict[str, Any]) -> None:
    message = refusal(config)
    if message is not None:
        assert_says_what_is_wrong(message)


def live(configs: list[dict[str, Any]]) -> list[str]:
    """How training went with each, in a simulation: "", or what was raised, and by whom."""

    def body(swarm: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        dtype = next(model.parameters()).dtype
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(swarm.particle)).to(dtype)

        def probe(index: int) -> torch.Tensor:
            return engine(x.abs()).float().square().mean()

        swarm.attach(engine, probe=probe)
        for _ in range(STEPS * engine.gradient_accumulation_steps()):
            engine.backward(engine(x).float().square().mean())
            engine.step()
        swarm.finish_pending()
        with swarm.consensus():
            assert all(p.isfinite().all() for p in model.parameters())

    found = []
    for config in configs:
        try:
            ds_pso.simulate(config, body)
            found.append("")
        except SwarmError as error:
            found.append(f"refused: {error}" if "\n" not in str(error) else f"many lines: {error}")
        except Exception as error:
            names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            inner = [name for name in names if "/deepspeed/" in name or name.startswith(PACKAGE)][-1]
            owner = "ds_pso" if inner.startswith(PACKAGE) else "deepspeed"
            found.append(f"{owner}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
    return found


def check(pool: Pool, drawn: list[dict[str, Any]]) -> None:
    accepted = [config for config in drawn if refusal(config) is None and config["swarm"].get("particles") == PARTICLES]
    (outcomes,) = pool.run(live, accepted, world_size=1, timeout=120) if accepted else ([],)
    for config, outcome in zip(accepted, outcomes, strict=True):
        if is_spoilt(config) and outcome.startswith("deepspeed: "):
            continue  # its own sections are its own to refuse, in its own words and when it finds out
        assert outcome == "" or outcome.startswith("refused: "), (config, outcome)


lists = st.lists(configs(), min_size=6, max_size=6)
quiet = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@given(lists)
@settings(max_examples=3, **quiet)
def test_a_few_configs(pool: Pool, drawn: list[dict[str, Any]]) -> None:
    check(pool, drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(lists)
@settings(max_examples=34, **quiet)
def test_two_hundred_configs(pool: Pool, drawn: list[dict[str, Any]]) -> None:
    check(pool, drawn)
