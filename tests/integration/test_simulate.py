"""A simulated swarm, threads of one process, gives the weights that real processes give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

import ds_pso
from ds_pso.swarm import Swarm

from .jobs import Case, Weights, assert_close, assert_equal, build_engine, config, probe_of, train, working_weights
from .test_truth import RULES, RULES_FOR_FOUR, weights_of_each


def simulated(cases: list[Case]) -> list[list[Weights]]:
    """Of each case, the final weights of each particle."""

    def life(case: Case, swarm: Swarm) -> Weights:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine, probe=probe_of(case, engine) if case.probe else None)
        train(case, engine, where=(swarm.particle, 0, 1))
        return working_weights(engine)

    return [ds_pso.simulate(config(case, 1), lambda swarm, case=case: life(case, swarm)) for case in cases]


def compare(pool: Pool, cases: dict[str, Case], particles: int, exactly: bool) -> None:
    jobs = [replace(case, particles=particles) for case in cases.values()]
    (simulations,) = pool.run(simulated, jobs, world_size=1, timeout=120)
    real = pool.run(weights_of_each, jobs, world_size=particles, timeout=120)
    for number, name in enumerate(cases):
        assert len(simulations[number]) == particles
        for particle, weights in enumerate(simulations[number]):
            try:
                (assert_equal if exactly else assert_close)(weights, real[particle][number])
            except AssertionError as error:
                raise AssertionError(f"{name}, particle {particle}: {error}") from error


@pytest.mark.parametrize("stage", slow_but([1], [0, 1]))
def test_two_particles_to_the_last_bit(pool: Pool, stage: int) -> None:
    """A sum of two numbers does not depend on their order."""
    compare(pool, {name: replace(case, stage=stage) for name, case in RULES.items()}, 2, exactly=True)


def test_differences_in_few_digits(pool: Pool) -> None:
    cases = {name: RULES[name] for name in ("local_sgd", "diloco", "easgd", "pso", "swarm")}
    for wire in ("bf16", "int4"):
        some = {name: replace(case, stage=0, swarm=case.swarm | {"wire": wire}) for name, case in cases.items()}
        compare(pool, some, 2, exactly=True)


def test_sync_points_in_the_background(pool: Pool) -> None:
    names = ("local_sgd", "easgd", "pso")
    compare(pool, {n: replace(RULES[n], stage=0, steps=6, swarm={"delay": 1}) for n in names}, 2, exactly=True)


@pytest.mark.slow
def test_four_particles_to_rounding(pool: Pool) -> None:
    compare(pool, {name: replace(case, stage=0) for name, case in RULES_FOR_FOUR.items()}, 4, exactly=False)


def test_in_half_precision_with_statistics_dropout_and_two_micro_batches(pool: Pool) -> None:
    base = Case(sync_mode="easgd", accumulate=2)
    cases = {
        "batch norm": replace(base, stage=1, batch_norm=True),
        "dropout": replace(base, stage=2, dropout=0.3, seed=0),  # each particle has a random state of its own
        "bf16": replace(base, stage=0, precision="bf16"),
        "bf16, ZeRO 2": replace(base, stage=2, precision="bf16", swarm={"optimizer_state": "average"}),
    }
    compare(pool, cases, 2, exactly=True)


def order_of_events(case: Case) -> Any:
    """Who does what when: the threads take turns at sync points."""
    events: list[tuple[int, int]] = []

    def life(swarm: Swarm) -> tuple[Any, ...]:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        for step in range(case.steps):
            train(case, engine, range(step, step + 1), where=(swarm.particle, 0, 1))
            events.append((swarm.particle, step))
        return (
            swarm.particle,
            swarm.is_leader,
            swarm.totals.count,
            swarm.gather(float(swarm.particle)),
            swarm.total_bytes(),
        )

    return ds_pso.simulate(config(case, 1), life), events


def test_particles_take_turns(pool: Pool) -> None:
    ((results, events),) = pool.run(order_of_events, Case(stage=0, particles=3, interval=2, steps=4), world_size=1)
    nbytes = results[0][-1]
    assert nbytes > 0
    assert results == [(particle, particle == 0, 2, [0.0, 1.0, 2.0], nbytes) for particle in range(3)]
    for particle in range(3):
        assert [step for who, step in events if who == particle] == [0, 1, 2, 3]
    # Nobody begins its third step before all have done their first: there was a sync point in between.
    third = min(position for position, (_, step) in enumerate(events) if step == 2)
    assert {who for who, step in events[:third] if step == 0} == {0, 1, 2}


def save_and_resume(case: Case, folder: Any) -> Any:
    def life(swarm: Swarm, steps: range, load: bool) -> Weights:
        engine = build_engine(replace(case, seed=5 if load else None), swarm.ds_config)
        swarm.attach(engine)
        if load:
            assert swarm.load(folder) == steps.start
        for step in steps:
            train(case, engine, range(step, step + 1), where=(swarm.particle, 0, 1))
            if engine.global_steps == 3 and not load:
                swarm.save(folder)
        swarm.export(folder / "model")
        return working_weights(engine)

    def run(steps: range, load: bool) -> list[Weights]:
        return ds_pso.simulate(config(case, 1), lambda swarm: life(swarm, steps, load))

    return run(range(6), False), run(range(3, 6), True)


def test_it_saves_and_resumes_like_a_real_one(pool: Pool, tmp_path: Any) -> None:
    case = Case(stage=1, sync_mode="easgd")
    ((whole, resumed),) = pool.run(save_and_resume, case, tmp_path, world_size=1)
    for mine, expected in zip(resumed, whole, strict=True):
        assert_equal(mine, expected)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def one_fails(case: Case) -> None:
    def life(swarm: Swarm) -> None:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        if swarm.particle == 1:
            raise ValueError("particle 1 has had enough")
        train(case, engine, where=(swarm.particle, 0, 1))

    ds_pso.simulate(config(case, 1), life)


def test_one_that_fails_ends_all(pool: Pool) -> None:
    (outcome,) = pool.outcomes(one_fails, Case(stage=0, particles=3), world_size=1)
    assert (outcome.kind, outcome.text) == ("ValueError", "particle 1 has had enough")


def in_a_launch_of_two(case: Case) -> None:
    ds_pso.simulate(config(case, 1), lambda swarm: None)


def test_a_launcher_of_several_ranks_is_refused(pool: Pool) -> None:
    for outcome in pool.outcomes(in_a_launch_of_two, Case(), world_size=2):
        assert (outcome.kind, "a simulation is one process" in outcome.text) == ("ConfigError", True)
    (outcome,) = pool.outcomes(in_a_launch_of_two, Case(particles="node"), world_size=1)
    assert (outcome.kind, "a simulation has no nodes" in outcome.text) == ("ConfigError", True)


def asynchronous(case: Case) -> list[Any]:
    def life(swarm: Swarm) -> Any:
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        train(case, engine, where=(swarm.particle, 0, 1))
        return [record["from"] for record in records], working_weights(engine)

    return [ds_pso.simulate(config(case, 1), life) for _ in range(2)]


def test_an_asynchronous_run_can_be_repeated_when_simulated(pool: Pool) -> None:
    case = Case(
        stage=0,
        particles=3,
        sync_mode="nosync",
        interval=1,
        steps=8,
        options={"asynchronous": True, "growth": "constant"},
    )
    ((one, two),) = pool.run(asynchronous, case, world_size=1)
    for (senders, weights), (others_senders, others_weights) in zip(one, two, strict=True):
        assert senders == others_senders
        assert len(set(senders) - {None}) == 2, "letters from both peers"
        assert_equal(weights, others_weights)
    assert any(np.any(one[0][1][name] != one[1][1][name]) for name in one[0][1])
