"""Differences in few digits, under ZeRO: nothing is lost, and all particles agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from variants import slow_but

from .jobs import Case, assert_equal, one_after_the_other, train, working_weights
from .oracle import train_particles
from .test_truth import SWARM

BASE = Case(steps=6, probe=True)
RULES = {
    "local_sgd": BASE,
    "diloco": replace(BASE, sync_mode="diloco"),
    "easgd": replace(BASE, sync_mode="easgd"),
    "nosync": replace(BASE, sync_mode="nosync", swarm={"total_steps": 6}),
    "pso": replace(BASE, sync_mode="pso", options={"social": 2.0}),  # r = 1/2: takes the best
    "swarm": replace(BASE, sync_mode="swarm", options=SWARM),
    "line_search": replace(BASE, sync_mode="line_search"),
}
ENDS_EQUAL = ("local_sgd", "diloco", "swarm", "line_search")
SENDS_MEAN_ONCE = ("local_sgd", "easgd", "nosync")  # and what all know is that mean


@dataclass
class SyncPointSeen:
    """Of one rank at one sync point, flat."""

    brought: np.ndarray
    residual_before: np.ndarray
    left_with: np.ndarray
    residual_after: np.ndarray
    common: np.ndarray


@dataclass
class Life:
    sync_points: list[SyncPointSeen]
    weights: dict[str, np.ndarray]


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([t.double() for t in tensors]).numpy()


def watch(cases: list[Case], nan_at: int | None = None) -> list[Life]:
    """Train; in sync point ``nan_at`` particle 1 has diverged."""
    lives = []
    for case, swarm, engine in one_after_the_other(cases):
        synchronizer, sync_points = swarm.session.synchronizer, []
        parts, real = synchronizer.parts, synchronizer.sync

        def sync(window: Any, step: int, s: Any = parts, real: Any = real, sync_points: Any = sync_points) -> Any:
            s.shards.zero_padding()
            if s.totals.count == nan_at and s.exchange.particle == 1:
                s.shards.tensors[0][:1] = math.nan
            before = flat(s.shards.tensors), flat(s.updater.differences.residual)
            record = real(window, step)
            d = s.updater.differences
            sync_points.append(SyncPointSeen(*before, flat(s.shards.tensors), flat(d.residual), flat(d.common)))
            return record

        synchronizer.sync = sync
        train(case, engine)
        lives.append(Life(sync_points, working_weights(engine)))
    return lives


def check(
    name: str, case: Case, ranks: list[Life], particle_size: int, nan_at: int | None = None, atol: float = 1e-6
) -> None:
    P = int(case.particles)
    for shard in range(particle_size):
        peers = [ranks[particle * particle_size + shard].sync_points for particle in range(P)]
        for number, sync_points in enumerate(zip(*peers, strict=True)):
            for sync_point in sync_points:
                np.testing.assert_array_equal(sync_point.common, sync_points[0].common)
                if name in ENDS_EQUAL:
                    np.testing.assert_array_equal(sync_point.left_with, sync_point.common)
            if name in SENDS_MEAN_ONCE:
                living = [m.brought for i, m in enumerate(sync_points) if (number, i) != (nan_at, 1)]
                residual_before, residual_after = (
                    sum(m.residual_before for m in sync_points),
                    sum(m.residual_after for m in sync_points),
                )
                np.testing.assert_allclose(
                    sync_points[0].common + residual_after, np.mean(living, axis=0) + residual_before, rtol=0, atol=atol
                )
            if name not in ("pso", "swarm") and case.swarm["wire"] != "bf16":  # what is tentative leaves over nothing
                assert any(m.residual_after.any() for m in sync_points) or not sync_points[0].common.size


@pytest.mark.parametrize(
    ("stage", "particles", "wire"),
    slow_but(
        [(3, 4, "int8")],
        [(0, 2, "int4"), (1, 2, "int8"), (2, 2, "bf16"), (3, 2, "int4"), (2, 4, "int4"), (3, 4, "int8")],
    ),
)
def test_every_rule(pool: Pool, stage: int, particles: int, wire: str) -> None:
    cases = [
        replace(case, stage=stage, particles=particles, swarm=case.swarm | {"wire": wire}) for case in RULES.values()
    ]
    ranks = pool.run(watch, cases, world_size=4, timeout=120)
    for index, (name, case) in enumerate(zip(RULES, cases, strict=True)):
        lives = [lives[index] for lives in ranks]
        check(name, case, lives, 4 // particles)
        if name in ENDS_EQUAL:
            for life in lives[1:]:
                assert_equal(life.weights, lives[0].weights)
        if wire != "int4" and name not in ("swarm", "line_search"):  # these may choose something else
            for particle, truth in enumerate(train_particles(case)):
                found = lives[particle * 4 // particles].weights
                for key, expected in truth.items():
                    np.testing.assert_allclose(found[key], expected, rtol=0, atol=5e-3, err_msg=f"{name} {key}")


def explode(cases: list[Case]) -> list[list[float]]:
    """How far the first particle is from where it began after each sync point, in training that stands still."""
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        start, distances = flat(swarm.session.synchronizer.parts.shards.tensors), []
        for step in range(case.steps):
            if step == 1 and swarm.particle == 3:
                for x in swarm.session.synchronizer.parts.shards.tensors:
                    x.mul_(1e4)  # finite all the same
            train(case, engine, range(step, step + 1))
            if (step + 1) % case.interval == 0:
                distances.append(
                    float(np.abs(flat(swarm.session.synchronizer.parts.shards.tensors) - start).max(initial=0.0))
                )
        found.append(distances)
    return found


def test_a_mean_that_is_thrown_away_leaves_nothing_behind(pool: Pool) -> None:
    """The guard takes the mean without the exploded particle; what was rounded in the other one is owed to nobody."""
    base = Case(
        sync_mode="swarm", probe=True, particles=4, steps=6, optimizer="SGD", lr=0.0, options=SWARM | {"inertia": 0.0}
    )
    cases = [replace(base, seed=1, swarm={"wire": wire}) for wire in ("fp32", "bf16", "int8", "int4")]
    for lives in pool.run(explode, cases, world_size=4)[:3]:
        assert np.max(lives) < 1e-3


def test_a_diverged_particle_sends_nothing_and_restarts(pool: Pool) -> None:
    cases = [replace(RULES[name], swarm=RULES[name].swarm | {"wire": "int4"}) for name in ("local_sgd", "easgd")]
    ranks = pool.run(watch, cases, 1, world_size=4)
    for index, name in enumerate(("local_sgd", "easgd")):
        lives = [lives[index] for lives in ranks]
        check(name, cases[index], lives, 2, nan_at=1)
        assert all(np.isfinite(m.left_with).all() for life in lives for m in life.sync_points)
