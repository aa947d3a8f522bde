"""``ds_pso.simulate``: particles as threads that take turns, repeatable, and gone when they should be.

tests/integration/test_simulate.py compares the weights with those of real processes. Here, too, every
simulation has a process of its own: DeepSpeed's world stays up as long as the process lives.
"""

from __future__ import annotations

import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.jobs import Case, Weights, assert_close, assert_equal, build_engine, config, train, working_weights
from pool import Pool
from safetensors.numpy import load_file
from variants import slow_but

import ds_pso
from ds_pso.distributed.simulated_world import Simulation
from ds_pso.metrics.log import read_metrics
from ds_pso.swarm import Swarm

PATIENCE_S = 30.0  # longest wait for what should happen at once, on a machine that may be busy
CASE = Case(stage=0, particles=3, interval=2, steps=6, dropout=0.3, seed=1)
RULES = {
    "pso": replace(CASE, sync_mode="pso", options={"best": "all_time", "inertia": 0.5, "randomness": "per_sync"}),
    "swarm": replace(CASE, sync_mode="swarm", options={"guard": False, "fitness_steps": 1}),
    "diloco": replace(CASE, sync_mode="diloco"),
}


def simulate(case: Case, life: Callable[[Swarm], Any], **options: Any) -> list[Any]:
    return ds_pso.simulate(config(case, 1), life, **options)


def attached(case: Case, swarm: Swarm) -> Any:
    """An engine that syncs with the swarm; every particle has a random state of its own from now on."""
    engine = build_engine(case, swarm.ds_config)
    torch.manual_seed(100 + swarm.particle)
    return swarm.attach(engine)


def trained(case: Case, swarm: Swarm) -> Weights:
    engine = attached(case, swarm)
    train(case, engine, where=(swarm.particle, 0, 1))
    return working_weights(engine)


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("particle")]


# -- repeatable -------------------------------------------------------------------------------


def train_some(cases: list[Case]) -> list[list[Weights]]:
    return [simulate(case, lambda swarm, case=case: trained(case, swarm)) for case in cases]


def test_a_run_can_be_repeated_bit_for_bit(pool: Pool):
    """In the same process after another one, and in another process."""
    cases = [*RULES.values(), *reversed(RULES.values())]
    (one,), (other,) = (pool.run(train_some, cases, world_size=1) for _ in range(2))
    for first, again, elsewhere in zip(one, reversed(one), other, strict=True):
        for particle in range(3):
            assert_equal(again[particle], first[particle])
            assert_equal(elsewhere[particle], first[particle])
    assert any(np.any(one[0][0][name] != one[1][0][name]) for name in one[0][0]), "rules differ"


def slow_messages(case: Case, slow: int | None) -> Any:
    def life(swarm: Swarm) -> Any:
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        engine = attached(case, swarm)
        for step in range(case.steps):
            if swarm.particle == slow:
                time.sleep(0.02)
            train(case, engine, range(step, step + 1), where=(swarm.particle, 0, 1))
        return [(record["from"], record.get("age")) for record in records], working_weights(engine)

    return simulate(case, life)


def test_who_is_slow_changes_nothing_also_where_nobody_waits(pool: Pool):
    options = {"asynchronous": True, "growth": "constant"}
    case = replace(CASE, sync_mode="nosync", interval=1, options=options)
    (expected,), (actual,) = (pool.run(slow_messages, case, slow, world_size=1) for slow in (None, 1))
    for (messages, weights), (expected_messages, expected_weights) in zip(actual, expected, strict=True):
        assert messages == expected_messages
        assert any(sender is not None for sender, _ in messages)
        assert_equal(weights, expected_weights)


def draw(case: Case, greedy: int | None) -> list[Any]:
    """Numbers that each particle draws between sync points; the greedy one draws others in between, and seeds anew."""

    def life(swarm: Swarm) -> Any:
        torch.manual_seed(swarm.particle)
        np.random.seed(swarm.particle)
        random.seed(swarm.particle)
        numbers = []
        for _ in range(4):
            numbers.append((torch.rand(()).item(), np.random.random(), random.random()))
            if swarm.particle == greedy:
                torch.rand(7), np.random.random(7), random.random()
                torch.manual_seed(9)
            swarm.gather(0.0)  # a sync point
        return numbers

    return simulate(case, life)


@pytest.mark.parametrize("greedy", [0, 1, 2])
def test_random_numbers_of_a_particle_do_not_depend_on_what_others_draw(pool: Pool, greedy: int):
    (alone,), (beside,) = (pool.run(draw, CASE, who, world_size=1) for who in (None, greedy))
    for particle in range(3):
        assert (beside[particle] == alone[particle]) == (particle != greedy)
    assert len({numbers[0] for numbers in alone}) == 3


def start_states(case: Case) -> Any:
    def life(swarm: Swarm) -> Any:
        first = torch.rand(()).item(), np.random.random(), random.random()
        swarm.gather(0.0)
        return first

    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    return simulate(case, life), (torch.initial_seed(), np.random.RandomState(5).random_sample())


def test_all_begin_with_the_random_state_of_the_caller(pool: Pool):
    ((states, (seed, number)),) = pool.run(start_states, CASE, world_size=1)
    assert len(set(states)) == 1
    generator = torch.Generator().manual_seed(5)
    assert states[0] == (torch.rand((), generator=generator).item(), number, random.Random(5).random())
    assert seed == 5


def overlap(case: Case) -> list[int]:
    """Who was at work when, as the particles saw it."""
    events: list[int] = []

    def life(swarm: Swarm) -> int:
        for _ in range(3):
            events.append(swarm.particle)
            time.sleep(0.01)  # lets the other threads run, if they may
            events.append(swarm.particle)
            swarm.gather(0.0)
        return swarm.particle

    assert simulate(case, life) == [0, 1, 2], "results come in the order of particles"
    return events


def test_one_works_at_a_time(pool: Pool):
    (events,) = pool.run(overlap, CASE, world_size=1)
    assert len(events) == 3 * 3 * 2
    assert events[::2] == events[1::2]
    for sync_point in range(3):
        assert sorted(events[6 * sync_point : 6 * sync_point + 6 : 2]) == [0, 1, 2], "nobody is a sync ahead"


# -- errors -----------------------------------------------------------------------------------


def failure_of(life: Callable[[Swarm], Any], case: Case = CASE) -> tuple[str, str, list[str]]:
    """What a simulation raises, and which threads are left."""
    try:
        simulate(case, life)
    except BaseException as error:
        return type(error).__name__, str(error), names_of_threads()
    return "", "", names_of_threads()


def meet_for_ever(swarm: Swarm) -> None:
    while True:
        swarm.gather(0.0)


def fail_in_many_ways() -> dict[str, Any]:
    ends: list[str] = []

    def body(swarm: Swarm, who: int, error: BaseException, sync_points: int) -> None:
        try:
            for _ in range(sync_points):
                swarm.gather(0.0)
            if swarm.particle == who:
                raise error
            meet_for_ever(swarm)
        except ds_pso.SwarmError as end:
            ends.append(f"{swarm.particle}: {type(end).__name__}: {end}")
            raise ArithmeticError("a later error, from cleaning up") from end

    found: dict[str, Any] = {}
    for who in range(3):
        for sync_points in (0, 2):
            ends.clear()
            failure = failure_of(lambda swarm, w=who, m=sync_points: body(swarm, w, ValueError(f"number {w}"), m))
            found[f"{who} after {sync_points}"] = failure, sorted(ends)
    for error in (SystemExit(3), KeyboardInterrupt("in a particle")):
        found[type(error).__name__] = failure_of(lambda swarm, error=error: body(swarm, 1, error, 1))
    found["all"] = failure_of(lambda swarm: (_ for _ in ()).throw(ValueError(f"number {swarm.particle}")))
    found["then"] = simulate(CASE, lambda swarm: swarm.gather(float(swarm.particle)))
    return found


def test_the_first_error_wins_and_ends_all(pool: Pool):
    (found,) = pool.run(fail_in_many_ways, world_size=1)
    for who in range(3):
        for sync_points in (0, 2):
            failure, ends = found[f"{who} after {sync_points}"]
            assert failure == ("ValueError", f"number {who}", [])
            assert {end[0] for end in ends} <= {"0", "1", "2"} - {str(who)}
            assert all("PeerError" in end and "the simulation was stopped" in end for end in ends), ends
            if sync_points:
                assert len(ends) == 2, "the others heard of it"
    assert found["SystemExit"] == ("SystemExit", "3", [])
    assert found["KeyboardInterrupt"] == ("KeyboardInterrupt", "in a particle", [])
    assert found["all"] == ("ValueError", "number 2", []), "it is the first to run, as the last to join"
    assert found["then"] == [[0.0, 1.0, 2.0]] * 3, "the next simulation knows nothing of it"


def best_of_asynchronous(case: Case) -> list[tuple[Weights, Weights]]:
    def life(swarm: Swarm) -> tuple[Weights, Weights]:
        engine = attached(case, swarm)
        train(case, engine, where=(swarm.particle, 0, 1))
        own = working_weights(engine)
        with swarm.consensus("best"):
            return own, working_weights(engine)

    return simulate(case, life)


def test_the_best_of_asynchronous_particles_is_one_of_them(pool: Pool):
    """Though each knows its own loss alone."""
    case = replace(CASE, sync_mode="nosync", options={"asynchronous": True, "growth": "constant"})
    (found,) = pool.run(best_of_asynchronous, case, world_size=1)
    bests = [best for _, best in found]
    for best in bests:
        assert_equal(best, bests[0])
    same = [all(np.array_equal(own[name], bests[0][name]) for name in own) for own, _ in found]
    assert sum(same) == 1


def warnings_of(case: Case) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        simulate(case, lambda swarm: attached(case, swarm))
    return [str(item.message) for item in caught if "swarm." in str(item.message)]


def test_a_training_too_short_to_meet_is_worth_a_warning(pool: Pool):
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}
    cases = [replace(CASE, interval=interval, deepspeed={"scheduler": scheduler}) for interval in (5, 6)]
    (enough,), (too_few,) = (pool.run(warnings_of, case, world_size=1) for case in cases)
    assert enough == []
    assert too_few == [
        "swarm.sync_interval = 6: longer than the whole training, so that there is no sync point; lower it"
    ]


def leave_early(gone: set[int], after: int) -> tuple[str, str, list[str]]:
    def life(swarm: Swarm) -> None:
        engine = attached(CASE, swarm)
        for step in range(CASE.steps):
            if swarm.particle in gone and step == after:
                return
            train(CASE, engine, range(step, step + 1), where=(swarm.particle, 0, 1))

    return failure_of(life)


@pytest.mark.parametrize("after", slow_but([3], [0, 3]))
@pytest.mark.parametrize("gone", slow_but([{0}, {0, 2}], [{0}, {1}, {2}, {0, 2}]), ids=str)
def test_who_waits_for_a_particle_that_has_ended_gets_its_name(pool: Pool, gone: set[int], after: int):
    ((kind, text, threads),) = pool.run(leave_early, gone, after, world_size=1, timeout=30)
    assert (kind, threads) == ("PeerError", [])
    told = f" waits for particles {sorted(gone)}, which have ended; all must reach the same sync points"
    assert text in {f"particle {i}{told}" for i in {0, 1, 2} - gone}


def leave_after_the_last_sync_point() -> Any:
    def life(swarm: Swarm) -> int:
        engine = attached(CASE, swarm)
        train(CASE, engine, range(4 + (swarm.particle == 1)), where=(swarm.particle, 0, 1))  # the fifth syncs alone
        return swarm.particle

    return simulate(CASE, life), names_of_threads()


def test_particles_may_end_one_after_the_other(pool: Pool):
    assert pool.run(leave_after_the_last_sync_point, world_size=1) == [([0, 1, 2], [])]


def interrupt(at: str) -> Any:
    """Ctrl-C in the main thread while particles train; how each of them ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends: dict[int, str] = {}
    raised = threading.Event()

    def life(swarm: Swarm) -> None:
        try:
            engine = attached(case, swarm)
            swarm.gather(0.0)
            if swarm.particle == 1:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                raised.wait(PATIENCE_S)
            while at == "messages":  # without any sync point
                train(case, engine, range(1), where=(swarm.particle, 0, 1))
            meet_for_ever(swarm)
        except ds_pso.SwarmError as error:
            ends[swarm.particle] = f"{type(error).__name__}: {error}"
            raise

    case = CASE
    if at == "messages":
        options = {"asynchronous": True, "growth": "constant"}
        case = replace(CASE, sync_mode="nosync", interval=1, options=options)
    try:
        simulate(case, life)
    except KeyboardInterrupt:
        raised.set()
        for thread in threading.enumerate():
            if thread.name.startswith("particle"):
                thread.join(PATIENCE_S)
        return names_of_threads(), ends
    return "not interrupted"


@pytest.mark.parametrize("at", ["meetings", "messages"])
def test_ctrl_c_ends_the_particles(pool: Pool, at: str):
    ((threads, ends),) = pool.run(interrupt, at, world_size=1)
    assert threads == []
    assert set(ends) == {0, 1, 2}
    assert {end.split(": ")[0] for end in ends.values()} == {"PeerError"}
    assert all("the simulation was stopped" in end for end in ends.values()), ends


# -- what is refused --------------------------------------------------------------------------


def refusals() -> dict[str, Any]:
    def another(**swarm: Any) -> Callable[[Swarm], Any]:
        section = {"particles": 3, "sync_mode": "local_sgd", **swarm}

        def life(swarm: Swarm) -> Any:
            swarm.close()
            with ds_pso.init({**config(CASE, 1), "swarm": section}) as second:
                return second.gather(float(second.particle))

        return life

    case = CASE
    return {
        "node": failure_of(lambda swarm: None, replace(case, particles="node")),
        "fewer": failure_of(another(particles=2)),
        "more": failure_of(another(particles=4)),
        "one": failure_of(another(sync_mode="allreduce")),
        "node then": failure_of(another(particles="node")),
        "as many": simulate(case, another(sync_mode="diloco")),
        "another number afterwards": simulate(replace(case, particles=2), lambda swarm: swarm.num_particles),
    }


def test_a_simulation_has_one_number_of_particles(pool: Pool):
    (found,) = pool.run(refusals, world_size=1)
    a_number = 'swarm.particles = "node": a simulation has no nodes; give a number'
    assert found["node"] == found["node then"] == ("ConfigError", a_number, [])
    for name, number in (("fewer", 2), ("more", 4), ("one", 1)):
        text = f"swarm.particles = {number}: this simulation began with 3; use one number"
        assert found[name] == ("ConfigError", text, [])
    assert found["as many"] == [[0.0, 1.0, 2.0]] * 3, "a second swarm after the first"
    assert found["another number afterwards"] == [2, 2]


def start_one() -> tuple[str, str, list[str]]:
    return failure_of(lambda swarm: None)


def test_a_launch_of_several_ranks_is_refused_before_anything_starts(pool: Pool):
    (failure,) = pool.run(start_one, world_size=1, env={"WORLD_SIZE": "2"})
    text = "a simulation is one process; start it with python, not with a launcher of several ranks"
    assert failure == ("ConfigError", text, [])


def bad_config() -> tuple[str, str, list[str]]:
    return failure_of(lambda swarm: None, replace(CASE, sync_mode="pos"))


def test_a_bad_config_is_said_once(pool: Pool):
    ((kind, text, threads),) = pool.run(bad_config, world_size=1)
    assert (kind, threads) == ("ConfigError", [])
    assert text.startswith("config: swarm.sync_mode = 'pos': must be one of")


# -- all that a swarm can do ------------------------------------------------------------------


def run_all(case: Case) -> Any:
    def life(swarm: Swarm) -> Any:
        return swarm.num_particles, swarm.particle, trained(case, swarm)

    return simulate(case, life), simulate(replace(case, sync_mode="local_sgd", particles=1), life)


@pytest.mark.parametrize("particles", [3, "node"])
def test_allreduce_is_one_particle_that_meets_nobody(pool: Pool, particles: int | str):
    case = replace(CASE, sync_mode="allreduce", particles=particles)
    (((number, particle, weights),), ((_, _, alone),)) = pool.run(run_all, case, world_size=1)[0]
    assert (number, particle) == (1, 0)
    assert_equal(weights, alone)


def train_and_save(case: Case, folder: Path) -> list[Weights]:
    def life(swarm: Swarm) -> Weights:
        engine = attached(case, swarm)
        sampler = swarm.sampler(range(64), batch_size=8)
        for step in range(case.steps):
            train(case, engine, range(step, step + 1), where=(swarm.particle, 0, 1))
            if step == 2:  # between two sync points
                swarm.save(folder)
        return working_weights(engine) | {"data": np.array(list(sampler))}

    return simulate(case, life, run_dir=folder)


def resume(case: Case, folder: Path) -> list[Weights]:
    def life(swarm: Swarm) -> Weights:
        engine = build_engine(replace(case, seed=50 + swarm.particle), swarm.ds_config)
        swarm.attach(engine)
        sampler = swarm.sampler(range(64), batch_size=8)
        step = swarm.load(folder)
        train(case, engine, range(step, case.steps), where=(swarm.particle, 0, 1))
        return working_weights(engine) | {"data": np.array(list(sampler))}

    return simulate(case, life)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_equals_one_that_was_not_interrupted(pool: Pool, tmp_path: Path, rule: str):
    (whole,) = pool.run(train_and_save, RULES[rule], tmp_path, world_size=1)
    (resumed,) = pool.run(resume, RULES[rule], tmp_path, world_size=1)
    for mine, expected in zip(resumed, whole, strict=True):
        assert_equal(mine, expected)
    start = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (start["event"], start["backend"], start["particles"], start["ranks"]) == ("start", "simulated", 3, 1)


def evaluate(case: Case, folder: Path) -> Any:
    def life(swarm: Swarm) -> Any:
        engine = attached(case, swarm)
        train(case, engine, range(5), where=(swarm.particle, 0, 1))  # the last step after the last sync point
        own = working_weights(engine)
        held = {}
        for which in ("consensus", "best"):
            with swarm.consensus(which):
                held[which] = working_weights(engine)
            swarm.export(folder / which, which)
        return own, held, working_weights(engine), list(swarm.session.synchronizer.parts.assessor.losses)

    return simulate(case, life)


def test_consensus_and_export_give_the_mean_and_the_best(pool: Pool, tmp_path: Path):
    case = replace(CASE, sync_mode="pso")
    (particles,) = pool.run(evaluate, case, tmp_path, world_size=1)
    own = [weights for weights, *_ in particles]
    losses = particles[0][3]
    expected = {
        "consensus": {name: np.mean([weights[name] for weights in own], axis=0) for name in own[0]},
        "best": own[int(np.argmin(losses))],
    }
    for mine, held, after, _ in particles:
        assert_equal(after, mine)
        for which in expected:
            assert_close(held[which], expected[which])
    for which in expected:
        exported = load_file(tmp_path / which / "model.safetensors")
        assert_close({name: exported[name] for name in exported}, expected[which])
    assert any(np.any(own[0][name] != own[1][name]) for name in own[0])


def outside() -> Any:
    """A thread that is no particle belongs to no simulation, also while there is one."""

    def life(swarm: Swarm) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(Simulation.world(3, 1.0)))
        thread.start()
        thread.join(PATIENCE_S)
        return found, Simulation.world(3, 1.0) is not None

    return Simulation.world(3, 1.0), simulate(CASE, life), Simulation.world(3, 1.0)


def test_only_particles_are_in_the_simulation(pool: Pool):
    assert pool.run(outside, world_size=1) == [(None, [([None], True)] * 3, None)]
