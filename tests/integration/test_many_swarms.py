"""Swarms of other rules one after the other in one launch give what a launch for each gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pool import Pool

import ds_pso

from .jobs import Case, assert_equal, config, one_after_the_other, optimizer_state, place, train, working_weights
from .test_truth import RULES

JOBS = {
    name: replace(RULES[name], batch_norm=not RULES[name].probe)
    for name in ("swarm", "average-momentum", "pso-per-tensor")
}


def lives(cases: list[Case]) -> list[Any]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        losses = train(case, engine)
        found.append(
            (losses, swarm.totals.count, swarm.totals.bytes_received, working_weights(engine), optimizer_state(engine))
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_three_in_one_launch(pool: Pool, stage: int) -> None:
    cases = [replace(case, stage=stage) for case in JOBS.values()]
    together = pool.run(lives, cases)
    for number, case in enumerate(cases):
        for rank, (alone,) in enumerate(pool.run(lives, [case])):
            *numbers, weights, moments = together[rank][number]
            assert numbers == list(alone[:3])
            assert_equal(weights, alone[3])
            assert_equal(moments, alone[4])


def another_number_of_particles(case: Case) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        ds_pso.init(config(replace(case, particles=4), 1), world=swarm.world)


def test_the_number_of_particles_stays(pool: Pool) -> None:
    for outcome in pool.outcomes(another_number_of_particles, Case()):
        assert outcome.kind == "ConfigError", outcome
        assert "swarm.particles = 4: the world that was given has 2" in outcome.text
