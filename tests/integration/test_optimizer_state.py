"""What becomes of the optimizer's moments at a sync point: kept, averaged or dropped, at every stage."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from variants import slow_but

import ds_pso

from .jobs import (
    Case,
    Weights,
    assert_close,
    assert_equal,
    build_model,
    config,
    one_after_the_other,
    optimizer_state,
    particle_batch,
    place,
    swarm_of,
    train,
    working_weights,
)
from .test_publish import OFFLOAD_ALL

ADAM = Case(interval=100)
MOMENTUM = Case(interval=100, optimizer="SGD", lr=0.1, momentum=0.9)
MUON = Case(interval=100, optimizer="Muon", momentum=0.9)  # of the matrices; vectors have Adam
JOBS = [
    replace(optimizer, swarm={"optimizer_state": what})
    for optimizer in (ADAM, MOMENTUM, MUON)
    for what in ("keep", "average", "reset")
]
STAGES = {
    **{f"zero{stage}": {"stage": stage, "groups": 2} for stage in (0, 1, 2, 3)},
    "zero0-bf16": {"stage": 0, "precision": "bf16"},
    "zero0-bf16-fused": {"stage": 0, "precision": "bf16", "fused": True},
    "zero1-bf16-fp32-accumulation": {
        "stage": 1,
        "precision": "bf16",
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "zero3-bf16-offload": {"stage": 3, "precision": "bf16", "deepspeed": {"zero_optimization": OFFLOAD_ALL}},
}


def around_a_sync(cases: list[Case]) -> list[tuple[Weights, Weights]]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine, range(3))
        before = optimizer_state(engine)
        swarm.sync()
        found.append((before, optimizer_state(engine)))
        train(case, engine, range(3, 5))
        assert optimizer_state(engine).keys() == before.keys()
    return found


def expected_after(what: str, before: Weights, peer: Weights) -> Weights:
    if what == "keep":
        return before
    mean = {name: ((value / np.float32(2)) + (peer[name] / np.float32(2))) for name, value in before.items()}
    return mean | {name: value for name, value in before.items() if name.endswith(".step")}


@pytest.mark.parametrize("name", slow_but(("zero2", "zero3-bf16-offload"), STAGES))
def test_moments_around_a_sync_point(pool: Pool, name: str) -> None:
    cases = [replace(case, **STAGES[name]) for case in JOBS]
    ranks = pool.run(around_a_sync, cases)
    for number, case in enumerate(cases):
        pairs = [rank[number] for rank in ranks]
        keys = {key.split(".")[1] for key in pairs[0][0]}
        assert keys >= ({"momentum_buffer"} if case.momentum else {"exp_avg", "exp_avg_sq", "step"})
        assert any((value != pairs[2][0][key]).any() for key, value in pairs[0][0].items()), "peers never differed"
        for rank, (before, after) in enumerate(pairs):
            if case.swarm["optimizer_state"] == "reset":
                assert not any(value.any() for value in after.values())  # none, but what DeepSpeed had made at first
                continue
            # Sums of two halves are exact but for one rounding, whatever their order.
            expected = expected_after(case.swarm["optimizer_state"], before, pairs[(rank + 2) % 4][0])
            if case.optimizer == "Muon" and case.precision == "bf16":  # its momentum is in the precision of gradients
                for key, value in expected.items():
                    np.testing.assert_allclose(after[key], value, rtol=2**-8)
            else:
                assert_equal(after, expected)


def overflow_from_the_start(case: Case) -> Any:
    """Each step of particle 1 up to the first sync point overflows, and is skipped."""
    particle, _, _ = place(case)
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(2), spoil=lambda step, loss: loss * (1e9 if particle == 1 else 1))
        applied = engine.skipped_steps == 0
        train(case, engine, range(2, 4))
        return applied, optimizer_state(engine), swarm.totals.count


@pytest.mark.parametrize("stage", slow_but([3], [0, 1, 2, 3]))
def test_a_particle_without_a_single_step_stops_nobody(pool: Pool, stage: int) -> None:
    """It has no moments yet, at some stages; the next sync point averages."""
    case = Case(stage=stage, precision="fp16", swarm={"optimizer_state": "average"})
    ranks = pool.run(overflow_from_the_start, case)
    assert [applied for applied, *_ in ranks] == [True, True, False, False]
    for _, moments, count in ranks:
        assert count == 2
        assert all(np.isfinite(value).all() for value in moments.values())
    for mine, theirs in zip(ranks[:2], ranks[2:], strict=True):
        assert_equal(*({k: v for k, v in side[1].items() if not k.endswith(".step")} for side in (mine, theirs)))


def nan_in_the_moments(case: Case) -> Weights:
    particle, _, _ = place(case)
    with swarm_of(case) as (_, engine):
        train(case, engine, range(1))
        train(case, engine, range(1, 2), spoil=lambda step, loss: loss * (math.nan if particle == 1 else 1))
        return optimizer_state(engine)


@pytest.mark.parametrize("what", slow_but(["average"], ["keep", "average", "reset"]))
def test_moments_that_are_not_finite_reach_nobody(pool: Pool, what: str) -> None:
    """In pure fp32 at stage 0 a NaN goes through to the moments; the particle is dead at the sync point."""
    ranks = pool.run(nan_in_the_moments, Case(stage=0, swarm={"optimizer_state": what}))
    healthy, _, mad, mate = ranks
    assert_equal(mad, mate)
    assert all(np.isfinite(value).all() for value in healthy.values())
    assert any(value.any() for key, value in healthy.items() if not key.endswith(".step")) == (what != "reset")
    assert mad.keys() == (healthy.keys() if what == "average" else set())
    for key in mad:  # the count of steps, too: it corrects the bias of the moments
        np.testing.assert_array_equal(mad[key], healthy[key], err_msg=key)


def with_optimizer(case: Case, name: str, what: str) -> Any:
    """Steps after a sync that resets, and those of a new optimizer from the weights that it left; or its refusal."""
    case = replace(case, swarm={"optimizer_state": what})
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        kind, options = getattr(torch.optim, name), {"initial_accumulator_value": 0.1} if name == "Adagrad" else {}
        ds_config = {key: value for key, value in swarm.ds_config.items() if key != "optimizer"}
        model = build_model(case)
        optimizer = kind(model.parameters(), lr=0.01, **options)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        swarm.attach(engine)
        train(case, engine, range(3))
        new = build_model(case)
        new.load_state_dict({key: torch.from_numpy(value) for key, value in working_weights(engine).items()})
        particle, _, _ = place(case)
        optimizer = kind(new.parameters(), lr=0.01, **options)
        for step in (3, 4):  # before the next sync
            train(case, engine, range(step, step + 1))
            x, y = particle_batch(particle, step)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(new(x), y).backward()
            optimizer.step()
        return working_weights(engine), {key: value.detach().numpy() for key, value in new.named_parameters()}


@pytest.mark.parametrize(
    ("name", "stage"), slow_but((("Rprop", 2),), [(n, s) for n in ("Rprop", "NAdam", "Adagrad") for s in (0, 2, 3)])
)
def test_a_reset_optimizer_is_a_new_one(pool: Pool, name: str, stage: int) -> None:
    """All optimizers: ``shards/test_optimizer_state.py``. These keep what does not begin at zero."""
    for mine, expected in pool.run(with_optimizer, Case(stage=stage, interval=3), name, "reset"):
        # A sum over two ranks is rounded otherwise, which turns the sign of a gradient near zero.
        assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_mean_is_not_averaged(pool: Pool) -> None:
    for outcome in pool.outcomes(with_optimizer, Case(interval=3), "Rprop", "average"):
        assert outcome.kind == "SwarmError"
        assert "swarm.optimizer_state = \"average\": Rprop keeps 'prev'" in outcome.text
