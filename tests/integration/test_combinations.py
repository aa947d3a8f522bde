"""Rules, wires, delays, fragments, streaming and moments in any combination: refused with a reason, or right.

Training stands still here (a learning rate of 0), so what comes later, or in pieces, has nothing to be corrected for:
whatever the combination, each round must leave what a plain blocking one leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import Pool
from torch import nn

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.errors import ConfigError

ROUNDS = 3
NUMEL = 40 * 40 + 40 + 40 * 20 + 20
NUMBERS = (12 + 2) * 8  # of each peer: its row, and how far it was
SPARSE = {"density": 0.1}
PLAIN = {"wire": "fp32", "delay": 0, "fragments": 1, "streaming": False, "state_dtype": "fp32", "bucket_mb": 64.0}
RULES: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "diloco": {},
    "diloco rda": {"merge": "rda"},
    "easgd": {},
    "noloco": {},
    "nosync": {"growth": "constant", "pressure": 0.8},
    "pso": {"inertia": 0.3, "cognitive": 0.5},
    "pso ring": {"topology": "ring"},
    "swarm": {"guard": False, "lr_spread": 1.0},
    "swarm guarded": {},
    "line_search": {},
}
# How far a round may be from the plain one, where particles begin up to 0.1 apart: any weight; of int2, which cuts off
# what lies far out, all of them (root mean square).
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "int8": 4e-3, "int4": 0.03, "e3m0": 0.03, "int2": 0.012}

keys = st.fixed_dictionaries(
    {
        "wire": st.sampled_from([*TOLERANCE, "sparse"]),
        "residual": st.sampled_from(["wire", "weights"]),
        "delay": st.sampled_from([0, 1, 2, 3, 4, 6]),
        "fragments": st.sampled_from([1, 2, 3]),
        "streaming": st.booleans(),
        "state_dtype": st.sampled_from(["fp32", "bf16"]),
        "bucket_mb": st.sampled_from([64.0, 2**11 / 2**20, 2**13 / 2**20]),  # one bucket; of 512 or 2048 elements
    }
)
moments = st.none() | st.fixed_dictionaries(
    {
        "first_every": st.sampled_from([1, 2, 3]),
        "second_every": st.sampled_from([1, 2, 3, 4]),
        "wire": st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    }
)
BETAS = {"first": 0.9, "second": 0.99}


@dataclass
class Life:
    """Of each particle."""

    begun: np.ndarray  # flat weights, before the first sync point
    weights: np.ndarray  # at the end
    received: list[int]  # bytes, at each sync point
    padded: int  # elements of the shard
    moments: dict[str, list[np.ndarray]]  # by kind: after the first step, and in the end


def section_of(
    rule: str, interval: int, particles: int, swarm: dict[str, Any], moments: dict[str, Any] | None = None
) -> dict[str, Any]:
    mode = rule.split()[0]
    if moments is not None:
        swarm = {**swarm, "optimizer_state": "average", "moments": moments}
    if swarm["wire"] == "fp32":  # it has no residual, wherever
        swarm = {key: value for key, value in swarm.items() if key != "residual"}
    options = {mode: RULES[rule], "sparse": SPARSE}
    return {"particles": particles, "sync_mode": mode, "sync_interval": interval, **options, **swarm}


def why_not(section: dict[str, Any]) -> str | None:
    """Why a combination is refused; None if it is not."""
    try:
        load_config({"swarm": section})
    except ConfigError as error:
        return str(error)
    return None


def live(section: dict[str, Any], stage: int) -> list[Life]:
    """So many steps that each fragment has synced ``ROUNDS`` times."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "betas": list(BETAS.values()), "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "swarm": section,
    }

    def body(swarm: Any) -> Life:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 20))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        swarm.attach(engine, probe=lambda index: torch.ones(()))
        shards, received = swarm.session.synchronizer.parts.shards, []
        generator = torch.Generator().manual_seed(1 + swarm.particle)
        for segment in shards.segments:
            part = shards.tensors[segment.shard][segment.shard_start : segment.shard_start + segment.numel]
            part.add_(0.1 * torch.rand(segment.numel, generator=generator))
        shards.publish()
        begun = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
        swarm.on_sync(lambda record: received.append(record.bytes_received))
        found: dict[str, list[np.ndarray]] = {"first": [], "second": []}

        def see() -> None:
            for kind, name in (("first", "exp_avg"), ("second", "exp_avg_sq")):
                named = [shards.named_moments()[s.shard][name] for s in shards.segments]
                parts = [
                    moment[s.shard_start : s.shard_start + s.numel]
                    for s, moment in zip(shards.segments, named, strict=True)
                ]
                found[kind].append(torch.cat([torch.zeros(0), *parts]).numpy().copy())

        for step in range(ROUNDS * section["sync_interval"] + section.get("delay", 0)):
            if step == 1:  # gradients are zero: what is there now fades, and is averaged
                for named in shards.named_moments():
                    named["exp_avg"].uniform_(-0.1, 0.1, generator=generator)
                    named["exp_avg_sq"].uniform_(0.5, 1.0, generator=generator)
                see()
            loss = engine(torch.ones(1, 40)).sum() * 0 + [1.0, 0.5, 2.0][swarm.particle]
            engine.backward(loss)
            engine.step()
        swarm.world.background.settle()
        see()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
        return Life(begun, weights, received, sum(t.numel() for t in shards.tensors), found)

    return ds_pso.simulate(config, body)


@cache
def plain(pool: Pool, rule: str, interval: int, particles: int, stage: int) -> list[Life]:
    (lives,) = pool.run(live, section_of(rule, interval, particles, PLAIN), stage, world_size=1)
    return lives


def bytes_of(numels: list[int], rule: str, particles: int, wire: str, bucket_mb: float) -> float:
    """Received by each particle at a sync point about so many elements; by all but the best in ``pso``."""
    if wire == "sparse":
        chunks = 0
        capacity = max(1, int(bucket_mb * 2**20) // (4 * 4096)) * 4096
        for numel in numels:
            whole, rest = divmod(numel, capacity)
            chunks += whole * capacity // 4096 + -(-rest // 4096)
        return (particles - 1) * chunks * (4 + 408 * 14 // 8)  # 408: a tenth of 4,096, and a multiple of 8
    per_number, scale = {
        "fp32": (4, 0),
        "bf16": (2, 0),
        "int8": (1, 4),
        "int4": (1 / 2, 4),
        "e3m0": (1 / 2, 4),
        "int2": (1 / 4, 4),
    }[wire]
    unit = 256 * particles if wire != "fp32" else 1
    capacity = max(1, int(bucket_mb * 2**20) // (4 * unit)) * unit
    total = 0.0
    for numel in numels:
        whole, rest = divmod(numel, capacity)
        for size in [capacity] * whole + [rest] * (rest > 0):
            padded = -(-size // unit) * unit
            total += padded * per_number + padded // 256 * scale
    return total if rule == "pso" else 2 * (particles - 1) / particles * total


def apart(some: np.ndarray, others: np.ndarray, wire: str) -> float:
    """How far, as ``TOLERANCE`` counts it."""
    off = some.astype(np.float64) - others
    return float(np.sqrt(np.mean(off**2)) if wire == "int2" else np.abs(off).max())


def check_weights(lives: list[Life], swarm: dict[str, Any], expected: list[Life]) -> None:
    """Against those of plain syncs, where these move everything and leave nothing with a particle."""
    wire = swarm["wire"]
    in_weights = swarm["residual"] == "weights" and wire != "fp32"
    tolerance = TOLERANCE.get(wire, 0.0) + (2e-3 if swarm["state_dtype"] == "bf16" else 0)
    moved = max(apart(life.weights, life.begun, wire) for life in lives)
    assert moved > 1.3 * tolerance, "or it would not be seen if nothing had met"
    if wire == "sparse":  # what it gives: test_sparse.py
        for life in lives:
            assert np.isfinite(life.weights).all()
            if not in_weights:  # nor is what a delay adds to them rounded alike, where they begin apart
                np.testing.assert_allclose(life.weights, lives[0].weights, rtol=0, atol=1e-7 if swarm["delay"] else 0)
    elif in_weights:  # in the mean of the particles nothing is lost
        mean = np.mean([life.weights for life in lives], axis=0)
        assert apart(mean, np.mean([other.weights for other in expected], axis=0), wire) <= tolerance
    else:
        for life, other in zip(lives, expected, strict=True):
            assert apart(life.weights, other.weights, wire) <= tolerance


def due(moments: dict[str, Any] | None, number: int) -> list[str]:
    """The kinds that travel at a sync point, from 0."""
    return [kind for kind in BETAS if moments is not None and (number + 1) % moments[f"{kind}_every"] == 0]


def check_moments(lives: list[Life], section: dict[str, Any], moments: dict[str, Any] | None) -> None:
    """Whatever the delay: the mean of all, if a sync point was theirs, faded by the steps since."""
    steps = ROUNDS * section["sync_interval"] + section["delay"] - 1
    for kind, beta in BETAS.items():
        begun = [life.moments[kind][0] for life in lives]
        meet = [number for number in range(ROUNDS) if kind in due(moments, number)]
        rounding = {"bf16": 2**-6, "int8": 0.04, "int4": 0.6}.get(moments["wire"], 0.0) if moments and meet else 0.0
        for life, own in zip(lives, begun, strict=True):
            expected = beta**steps * (np.mean(begun, axis=0) if meet else own)
            tolerance = rounding * float(np.abs(expected).max())
            np.testing.assert_allclose(life.moments[kind][1], expected, rtol=1e-4, atol=tolerance + 1e-7)
            assert kind == "first" or (life.moments[kind][1] >= 0).all()


def bytes_of_moments(numel: int, particles: int, moments: dict[str, Any], kinds: list[str], bucket_mb: float) -> float:
    """Each kind by itself, and whether all have them."""
    found = sum(bytes_of([numel], "mean", particles, moments["wire"], bucket_mb) for _ in kinds)
    return found + 8 * (particles - 1) * bool(kinds)


@given(
    rule=st.sampled_from(list(RULES)),
    particles=st.sampled_from([2, 3]),
    interval=st.sampled_from([4, 6]),
    stage=st.sampled_from([0, 1, 2]),
    swarm=keys,
    moments=moments,
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_combination(
    pool: Pool,
    rule: str,
    particles: int,
    interval: int,
    stage: int,
    swarm: dict[str, Any],
    moments: dict[str, Any] | None,
) -> None:
    section = section_of(rule, interval, particles, swarm, moments)
    reason = why_not(section)
    if reason is not None:
        assert reason.startswith("config: swarm.")
        assert "; " in reason, "says what to do instead"
        return
    (lives,) = pool.run(live, section, stage, world_size=1)
    check_weights(lives, swarm, plain(pool, rule, interval, particles, stage))
    check_moments(lives, section, moments)
    fragments = swarm["fragments"]
    bounds = [NUMEL * k // fragments for k in range(fragments + 1)]
    numels = [bounds[k + 1] - bounds[k] for k in range(fragments)] if fragments > 1 else [lives[0].padded]
    if rule in ("swarm guarded", "line_search", "pso ring"):
        return  # they receive more than once, or do not all receive the same: see test_bytes.py
    for particle, life in enumerate(lives):
        assert len(life.received) == ROUNDS * (fragments if swarm["streaming"] else 1)
        for number, nbytes in enumerate(life.received):
            about = [numels[number % fragments]] if swarm["streaming"] else numels
            moved = bytes_of(about, rule, particles, swarm["wire"], swarm["bucket_mb"])
            if rule == "pso" and particle == 1:
                moved = 0
            lengths = 8 * 2 * (particles - 1) if rule == "diloco rda" else 0  # of two matrices
            kinds = due(moments, number)
            if moments is not None:
                moved += bytes_of_moments(life.padded, particles, moments, kinds, swarm["bucket_mb"])
            rounding = 4 * (len(about) + len(kinds)) * (1 + NUMEL // 512) if particles == 3 else 0
            assert nbytes == pytest.approx(moved + NUMBERS * (particles - 1) + lengths, abs=rounding)
