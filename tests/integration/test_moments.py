"""Moments at periods of their own, through a wire of their own: each sync against its equations, on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from variants import slow_but

import ds_pso
from ds_pso.errors import SwarmError
from ds_pso.shards.optimizer_state import MOMENTS_OF_KIND

from .jobs import (
    Case,
    Weights,
    assert_close,
    config,
    one_after_the_other,
    optimizer_state,
    place,
    swarm_of,
    train,
    working_weights,
)
from .oracle import train_particles

ADAM = Case(interval=1, steps=7)
MUON = Case(interval=1, steps=7, optimizer="Muon", momentum=0.9)
SCALARS = 14 * 8  # bytes of a peer's report, and of how far it was
KINDS = ("first", "second")
LIMIT = 1.05 * 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))  # of Adam's default betas
LIMIT_IN_MUON = 1.05 * 0.1 / math.sqrt(0.05 * (1 - 0.81 / 0.95))  # of those of what Muon leaves to Adam
LEVELS = {"int8": 127, "int4": 7}
BYTES = {"bf16": (2, 0), "int8": (1, 4), "int4": (0.5, 4)}  # of an element, and of 256


# -- in NumPy --------------------------------------------------------------------------------------


def rounded(wire: str, values: np.ndarray) -> np.ndarray:
    """What arrives of whole blocks of 256."""
    if wire == "bf16":
        return torch.from_numpy(values).bfloat16().float().numpy()
    blocks = values.reshape(-1, 256)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(LEVELS[wire])
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.round(blocks * np.where(scale > 0, 1 / scale, 0))
    return (np.clip(numbers, -LEVELS[wire], LEVELS[wire]) * scale).astype(np.float32).ravel()


def arrives(wire: str, kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "first":
        return rounded(wire, values)
    return rounded(wire, np.sqrt(np.maximum(values, 0, dtype=np.float32))) ** 2


def mean_of_two(
    wire: str, kind: str, moments: list[np.ndarray], residuals: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The mean of two peers in two phases, and their new residuals."""
    size = -(-len(moments[0]) // 512) * 512
    values = [np.zeros(size, np.float32) for _ in moments]
    for own, moment, residual in zip(values, moments, residuals, strict=True):
        own[: len(moment)] = moment / np.float32(2) + residual
    halves = [slice(0, size // 2), slice(size // 2, size)]
    mean, sums = np.zeros(size, np.float32), []
    for i, half in enumerate(halves):
        sent = arrives(wire, kind, values[1 - i][half])
        sums.append(values[i][half] + sent)
        values[1 - i][half] -= sent
    for i, half in enumerate(halves):
        mean[half] = arrives(wire, kind, sums[i])
        values[i][half] = sums[i] - mean[half]
    return mean[: len(moments[0])], [own[: len(moments[0])] for own in values]


def expected(
    wire: str, due: tuple[str, ...], before: list[dict[str, np.ndarray]], residuals: list[dict[str, np.ndarray]]
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Moments and residuals of two peers after a sync."""
    after = [dict(moments) for moments in before]
    left = [dict(found) for found in residuals]
    for kind in due:
        own = [moments[kind] for moments in before]
        if wire == "fp32":
            means = [own[0] / np.float32(2) + own[1] / np.float32(2)] * 2
        elif not own[0].size:
            continue
        else:
            kept = [found.get(kind, np.zeros_like(x)) for found, x in zip(residuals, own, strict=True)]
            mean, new = mean_of_two(wire, kind, own, kept)
            means = [np.maximum(mean, x / np.float32(2)) if kind == "second" else mean for x in own]
            for found, residual in zip(left, new, strict=True):
                found[kind] = residual
        for moments, mean in zip(after, means, strict=True):
            moments[kind] = mean
    return after, left


def bounded(moments: dict[str, np.ndarray], pairs: np.ndarray, limit: float) -> dict[str, np.ndarray]:
    """``pairs``: which elements of the first have a second one, in the same order."""
    first = moments["first"].copy()
    most = np.float32(limit) * np.sqrt(moments["second"])
    first[pairs] = np.clip(first[pairs], -most, most)
    return moments | {"first": first}


# -- on the ranks ----------------------------------------------------------------------------------


@dataclass
class Sync:
    """Of one rank; flat, by kind."""

    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]  # residuals, before
    left: dict[str, np.ndarray]  # and after
    pairs: np.ndarray
    nbytes: int
    said: list[str]
    weights: int  # elements of the shards


def flat_moments(parts: Any) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {kind: [np.zeros(0, np.float32)] for kind in KINDS}
    for named in parts.shards.named_moments():
        for name, moment in named.items():
            kind = "second" if name in MOMENTS_OF_KIND["second"] else "first"
            found[kind].append(moment.detach().float().cpu().numpy().copy())
    return {kind: np.concatenate(values) for kind, values in found.items()}


def flat_residuals(parts: Any) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for name, residual in parts.moments.residuals().items():
        found.setdefault(name.split(".")[0], []).append(residual.float().cpu().numpy().copy())
    return {kind: np.concatenate(values) for kind, values in found.items()}


def syncs_of(case: Case) -> tuple[list[Sync], Weights]:
    found: list[Sync] = []
    with swarm_of(case) as (swarm, engine):
        synchronizer = swarm.session.synchronizer
        parts, real = synchronizer.parts, synchronizer.sync

        def sync(*arguments: Any) -> Any:
            before, kept = flat_moments(parts), flat_residuals(parts)
            pairs = [
                np.full(moment.numel(), "exp_avg_sq" in named)
                for named in parts.shards.named_moments()
                for name, moment in named.items()
                if name in MOMENTS_OF_KIND["first"]
            ]
            record = real(*arguments)
            after = flat_moments(parts), flat_residuals(parts)
            whole = np.concatenate([np.zeros(0, bool), *pairs])
            numel = sum(t.numel() for t in parts.shards.tensors)
            found.append(
                Sync(before, after[0], kept, after[1], whole, record.bytes_received, list(record.moments), numel)
            )
            return record

        synchronizer.sync = sync
        train(case, engine)
        return found, optimizer_state(engine)


@pytest.mark.parametrize(
    ("stage", "optimizer", "wire"),
    slow_but(
        [(3, "Muon", "int8")],
        [(s, o, w) for s in (0, 1, 2, 3) for o in ("AdamW", "Muon", "SGD") for w in ("fp32", "bf16", "int8", "int4")],
    ),
)
def test_every_sync_is_that_of_the_equations(pool: Pool, stage: int, optimizer: str, wire: str) -> None:
    """Each kind when it is due and not otherwise; its bytes; and what rounding leaves goes with the next."""
    every = {"first_every": 2, "second_every": 3}
    base = {"AdamW": ADAM, "Muon": MUON, "SGD": replace(ADAM, optimizer="SGD", lr=0.1, momentum=0.9)}[optimizer]
    case = replace(base, stage=stage, swarm={"optimizer_state": "average", "moments": {**every, "wire": wire}})
    ranks = pool.run(syncs_of, case)
    for (mine, _), (theirs, _) in zip(ranks[:2], ranks[2:], strict=True):
        assert len(mine) == case.steps
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            due = tuple(kind for kind in KINDS if (index + 1) % every[f"{kind}_every"] == 0)
            before, kept = [sync.before for sync in pair], [sync.kept for sync in pair]
            after, left = expected(wire, due, before, kept)
            for sync, moments, residual in zip(pair, after, left, strict=True):
                assert sync.said == list(due)
                limit = LIMIT_IN_MUON if optimizer == "Muon" else LIMIT
                moments = bounded(moments, sync.pairs, limit) if due else moments
                for kind in KINDS:
                    np.testing.assert_allclose(sync.after[kind], moments[kind], rtol=2e-6, atol=1e-12)
                    if kind in residual and sync.before[kind].size:
                        scale = max(1e-12, float(np.abs(sync.before[kind]).max()))
                        np.testing.assert_allclose(sync.left[kind], residual[kind], rtol=0, atol=1e-6 * scale)
                assert (sync.after["second"] >= 0).all()
                assert sync.nbytes == bytes_of(sync, due, wire)
        assert any(np.any(sync.left.get("first", 0)) for sync in mine) == (wire != "fp32")


def bytes_of(sync: Sync, due: tuple[str, ...], wire: str) -> int:
    """Between two particles: half of everything, twice."""
    total = 4.0 * sync.weights + SCALARS + (8 if due else 0)
    for kind in due:
        numel = len(sync.before[kind])
        if wire == "fp32":
            total += 4 * numel
        else:
            padded, (element, block) = -(-numel // 512) * 512, BYTES[wire]
            total += padded * element + padded // 256 * block
    return int(total)


CASES = {
    "adam": Case(steps=10, interval=3, swarm={"moments": {"first_every": 1, "second_every": 2}}),
    "adam, every time": Case(steps=10, interval=3),
    "momentum": Case(
        steps=10, interval=3, optimizer="SGD", lr=0.1, momentum=0.9, swarm={"moments": {"first_every": 2}}
    ),
}


def weights_of_each(cases: list[Case]) -> list[Weights]:
    found = []
    for case, _, engine in one_after_the_other(cases):
        train(case, engine)
        found.append(working_weights(engine))
    return found


@pytest.mark.parametrize(("stage", "delay"), slow_but([(2, 2)], [(s, d) for s in (0, 1, 2, 3) for d in (0, 1, 2, 3)]))
def test_what_comes_late_is_what_steps_have_left_of_it(pool: Pool, stage: int, delay: int) -> None:
    """m <- m now + beta^delay (mean - m when it began), and training goes on with it: against plain torch."""
    cases = [
        replace(case, stage=stage, swarm={"optimizer_state": "average", "delay": delay, **case.swarm})
        for case in CASES.values()
    ]
    ranks = pool.run(weights_of_each, cases)
    for number, case in enumerate(cases):
        for particle, weights in enumerate(train_particles(case)):
            for rank in (2 * particle, 2 * particle + 1):
                assert_close(ranks[rank][number], weights)


# -- what is special -------------------------------------------------------------------------------


def unseen(case: Case, wire: str) -> Any:
    """Elements that particle 1 has trained, and particle 0 has not, as the row of a token that only one has met."""
    case = replace(case, swarm={"optimizer_state": "average", "moments": {"second_every": 2, "wire": wire}})
    particle, _, _ = place(case)
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(1))
        for named in swarm.session.synchronizer.parts.shards.named_moments():
            if particle == 0:
                named["exp_avg"][::2] = 0
                named["exp_avg_sq"][::2] = 0
        swarm.sync()
        for named in swarm.session.synchronizer.parts.shards.named_moments():
            assert (named["exp_avg"].abs() <= LIMIT * named["exp_avg_sq"].sqrt()).all()
        mean = working_weights(engine)
        train(case, engine, range(1, 3))
        after = working_weights(engine)
        return max(float(np.abs(after[name] - mean[name]).max()) for name in after)


@pytest.mark.parametrize("wire", slow_but(["int4"], ["fp32", "int4"]))
def test_a_moment_of_others_is_not_divided_by_nothing(pool: Pool, wire: str) -> None:
    """Without the bound a step there would be some thousand times the learning rate."""
    case = replace(ADAM, stage=2, interval=100)
    for moved in pool.run(unseen, case, wire):
        assert moved < 8 * 2 * case.lr


def dies(case: Case) -> Any:
    particle, _, _ = place(case)
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(2))
        train(case, engine, range(2, 3), spoil=lambda step, loss: loss * (math.nan if particle == 1 else 1))
        died = optimizer_state(engine)
        train(case, engine, range(3, 8))
        residuals = swarm.session.synchronizer.parts.moments.residuals().values()
        alive = all(bool(torch.isfinite(residual).all()) for residual in residuals)
        return alive, died, optimizer_state(engine), working_weights(engine)


@pytest.mark.parametrize("delay", slow_but([0], [0, 1]))
def test_a_dead_particle_begins_anew_and_spoils_nobody(pool: Pool, delay: int) -> None:
    every = {"first_every": 1, "second_every": 2, "wire": "int4"}
    case = Case(stage=0, interval=1, swarm={"optimizer_state": "average", "moments": every, "delay": delay})
    for number, (alive, died, moments, weights) in enumerate(pool.run(dies, case)):
        assert alive, "a residual is not finite"
        if not delay:
            assert bool(died) == (number < 2), "moments of which one half is of others, and the other of nobody"
        for values in (*moments.values(), *weights.values()):
            assert np.isfinite(values).all()


def refused(case: Case) -> Any:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        model = torch.nn.Linear(7, 3)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, centered=True)
        ds_config = {key: value for key, value in swarm.ds_config.items() if key != "optimizer"}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        swarm.attach(engine)
        train(case, engine)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"moments": {"wire": "int8"}}, {"delay": 1}])
def test_moments_that_must_fit_to_others_are_refused(pool: Pool, keys: dict[str, Any]) -> None:
    """A centred RMSprop divides by the root of a difference of two, which rounding would make negative."""
    for outcome in pool.outcomes(refused, Case(swarm={"optimizer_state": "average", **keys})):
        assert outcome.kind == SwarmError.__name__
        assert "swarm.moments: the optimizer keeps 'grad_avg'" in outcome.text
