"""An elastic swarm loses particles, and the others go on; who comes back is given what it missed.

Time limits prove that nobody hangs. What is lost is at most the work of the lost particle since its last sync point.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elastic.swarms import elastic, lighthouse, particle, places
from integration.jobs import Case, assert_equal, swarm_of, train, working_weights
from pool import Outcome, Pool, free_port

from ds_pso.elastic.lighthouse import QuorumClient
from ds_pso.swarm import Swarm
from ds_pso.utils.atomic_io import write_atomically

LIMIT_S = 60.0
SLOW = pytest.mark.slow
CASE = elastic(Case(seed=3, particles=3, interval=2, steps=8))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with lighthouse() as url:
        yield url


def listen(swarm: Swarm) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    swarm.on_sync(lambda record: records.append(record.to_json()))
    return records


def leave(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "raised":
        raise ValueError("something else went wrong")


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.02)


# -- losing one -----------------------------------------------------------------------------------


def lose_one(case: Case, lost: int, where: str, how: str, ranks: tuple[int, ...]) -> Any:
    """The ranks ``ranks`` of particle ``lost`` leave at the second sync point, or in the step before it."""
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(3))
        begin = time.monotonic()
        if particle() == lost and swarm.world.layout.shard_rank in ranks:
            if where == "steps":
                leave(how)
            if where == "exchange":
                weighted_mean = swarm.session.exchange.weighted_mean

                def half(*arguments: Any) -> Iterator[Any]:
                    for piece in weighted_mean(*arguments):
                        yield piece
                        leave(how)

                swarm.session.exchange.weighted_mean = half
            if where == "vote":
                swarm.world.membership._vote = lambda: leave(how)
        train(case, engine, range(3, 4))
        took = time.monotonic() - begin
        train(case, engine, range(4, case.steps))
        if case.swarm.get("delay"):
            swarm.sync()  # until then each has its own steps since the beginning of the last
        return records, took, working_weights(engine)


def assert_went_on(outcomes: list[Outcome], lost: int, size: int, case: Case) -> None:
    others = [rank for rank in range(len(outcomes)) if rank // size != lost]
    survivors = [p for p in range(int(case.particles)) if p != lost]
    for rank in others:
        records, took, weights = outcomes[rank].get()
        assert len(records) == case.steps // case.interval
        assert list(records[0]["alive"]) == [True] * int(case.particles)
        assert [list(record["present"]) for record in records[1:]] == [survivors] * 3
        assert all(np.isnan(record["losses"][lost]) for record in records[1:])
        assert took < 3 * case.swarm["timeout_s"]
        assert_equal(weights, outcomes[others[0]].get()[2])


SMALL_BUCKETS = {"bucket_mb": 0.0001}  # so that an exchange can be lost half way


@pytest.mark.parametrize(
    ("lost", "where"),
    [
        (0, "exchange"),
        *(
            pytest.param(*p, marks=SLOW)
            for p in [(2, "steps"), (0, "steps"), (0, "vote"), (2, "exchange"), (2, "vote")]
        ),
    ],
)
def test_a_particle_is_killed(pool: Pool, url: str, lost: int, where: str) -> None:
    case = replace(CASE, swarm=CASE.swarm | SMALL_BUCKETS)
    outcomes = pool.outcomes(
        lose_one, case, lost, where, "killed", (0,), world_size=3, env=places(url, 3, 1), timeout=LIMIT_S
    )
    assert outcomes[lost].kind == "Killed"
    assert_went_on(outcomes, lost, 1, case)


@pytest.mark.slow
def test_what_a_broken_sync_point_has_measured_is_forgotten(pool: Pool, url: str) -> None:
    """A sync point that was broken off and made again is logged as one that was made at once."""
    case = replace(CASE, swarm=CASE.swarm | SMALL_BUCKETS)
    found = []
    for where in ("steps", "exchange"):
        outcomes = pool.outcomes(
            lose_one, case, 2, where, "killed", (0,), world_size=3, env=places(url, 3, 1), timeout=LIMIT_S
        )
        found.append([record["drift"] for record in outcomes[0].get()[0]])
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_schedule_learns_nothing_from_a_sync_point_that_came_to_nothing(pool: Pool, url: str) -> None:
    case = replace(CASE, swarm=CASE.swarm | SMALL_BUCKETS | {"delay": 1})
    outcomes = pool.outcomes(
        lose_one, case, 2, "exchange", "killed", (0,), world_size=3, env=places(url, 3, 1), timeout=LIMIT_S
    )
    for outcome in outcomes[:2]:
        abandoned = [record for record in outcome.get()[0] if record.get("abandoned")]
        assert abandoned
        assert all(np.isnan([record["step_s"], record["drift"]]).all() for record in abandoned)


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        (3, "steps"),
        *(pytest.param(*p, marks=SLOW) for p in [(2, "exchange"), (2, "vote"), (3, "exchange"), (3, "vote")]),
    ],
)
def test_one_rank_of_a_particle_is_killed(pool: Pool, url: str, stage: int, where: str) -> None:
    """Its local rank would be ended by the launcher; the others lose both."""
    case = replace(CASE, stage=stage, particles=2, swarm=CASE.swarm | SMALL_BUCKETS)
    outcomes = pool.outcomes(
        lose_one, case, 0, where, "killed", (1,), world_size=4, env=places(url, 2, 2), timeout=LIMIT_S, silent=(0,)
    )
    assert outcomes[1].kind == "Killed"
    assert_went_on(outcomes, 0, 2, case)


@pytest.mark.parametrize("delay", [pytest.param(0, marks=SLOW), 1])
def test_the_others_mean_what_they_learned(pool: Pool, url: str, delay: int) -> None:
    """After the loss the two who are left are what a swarm of two would be."""
    case = replace(CASE, swarm=CASE.swarm | {"delay": delay})
    outcomes = pool.outcomes(
        lose_one, case, 2, "steps", "killed", (0,), world_size=3, env=places(url, 3, 1), timeout=LIMIT_S
    )
    first, second = outcomes[0].get(), outcomes[1].get()
    assert [record["alive"] for record in first[0]] == [record["alive"] for record in second[0]]
    assert_equal(first[2], second[2])


# -- coming back ----------------------------------------------------------------------------------


def come_late(case: Case, late: int, folder: Path) -> Any:
    """Particle ``late`` starts when the others have been through two sync points, and they wait for it at the third."""
    if particle() == late:
        wait_for(*(folder / f"go {p}" for p in range(late)))
    ask = QuorumClient.request_quorum

    def ask_and_tell(*arguments: Any, **options: Any) -> Any:
        threading.Timer(0.5, (folder / "asks").touch).start()
        return ask(*arguments, **options)

    if particle() == late:
        QuorumClient.request_quorum = ask_and_tell  # type: ignore[method-assign]
    with swarm_of(case) as (swarm, engine):
        records, data = listen(swarm), swarm.sampler(range(1000))
        at = engine.global_steps
        if particle() != late:
            train(case, engine, range(4))
            swarm.finish_pending()
            (folder / f"go {particle()}").touch()
            wait_for(folder / "asks")
        train(case, engine, range(engine.global_steps, case.steps))
        swarm.sync()
        return at, records, working_weights(engine), swarm.totals.count, data.state_dict()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(CASE, marks=SLOW),
        pytest.param(replace(CASE, sync_mode="diloco", stage=3, particles=2), marks=SLOW),
        pytest.param(replace(CASE, sync_mode="pso", options={"inertia": 0.5, "cognitive": 0.5}), marks=SLOW),
        pytest.param(
            replace(CASE, sync_mode="diloco", batch_norm=True, swarm=CASE.swarm | {"wire": "int8"}), marks=SLOW
        ),
        replace(CASE, swarm=CASE.swarm | {"delay": 1}),
    ],
    ids=["averaging", "diloco at stage 3", "pso", "int8", "late"],
)
def test_a_particle_comes_late(pool: Pool, url: str, tmp_path: Path, case: Case) -> None:
    particles, late = int(case.particles), int(case.particles) - 1
    size = 2 if particles == 2 else 1
    env = places(url, particles, size, start=particles - 1)
    ranks = pool.run(come_late, case, late, tmp_path, world_size=particles * size, env=env, timeout=LIMIT_S)
    for rank, (at, records, weights, count, data) in enumerate(ranks):
        assert count == 5
        assert (data["epoch"], data["batch"]) == (0, case.steps)
        # With a delay it breaks off what the others have begun in the background, and syncs with them a step later.
        assert at == (6 + case.swarm.get("delay", 0) if rank // size == late else 0)
        recovered = [list(record.get("recovered", [])) for record in records]
        assert [late] in recovered or rank // size == late
        assert all(np.isfinite(value).all() for value in weights.values())
        if case.sync_mode != "pso":  # its particles stay apart
            weights.pop("norm.num_batches_tracked", None)
            assert_equal(weights, {name: ranks[0][2][name] for name in weights})


def stall(case: Case, stalled: int, for_s: float, folder: Path) -> Any:
    """One particle is stopped in its steps; the next one lets it go on."""
    with swarm_of(case) as (swarm, engine):
        records, data = listen(swarm), swarm.sampler(range(1000))
        train(case, engine, range(3))
        if particle() == stalled:
            write_atomically(folder / "stopped", str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        elif particle() == (stalled + 1) % int(case.particles):
            wait_for(folder / "stopped")
            pid = int((folder / "stopped").read_text())
            threading.Timer(for_s, os.kill, (pid, signal.SIGCONT)).start()
        while engine.global_steps < case.steps:
            train(case, engine, range(engine.global_steps, engine.global_steps + 1))
            time.sleep(0.25)
        return records, working_weights(engine), data.state_dict()


@SLOW
@pytest.mark.parametrize(("for_s", "left_out"), [(0.5, False), (5.0, True)])
def test_a_stalled_particle(pool: Pool, url: str, tmp_path: Path, for_s: float, left_out: bool) -> None:
    case = replace(CASE, steps=24)
    ranks = pool.run(stall, case, 1, for_s, tmp_path, world_size=3, env=places(url, 3, 1), timeout=LIMIT_S)
    present = [list(record["present"]) for record in ranks[0][0]]
    assert present[0] == present[-1] == [0, 1, 2]
    assert ([0, 2] in present) == left_out
    assert ([1] in [list(record["recovered"]) for record in ranks[0][0]]) == left_out
    for _, weights, data in ranks:
        assert_equal(weights, ranks[0][1])
        assert (data["epoch"], data["batch"]) == (0, case.steps)


def be_slow(case: Case, missed: int, folder: Path) -> Any:
    """Particle 1 comes to sync point ``missed`` when the others have been through it; they sync it at the next."""
    step = case.interval * (missed + 1)
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(step - 1))
        if particle() == 1:
            wait_for(folder / "met without it")
        train(case, engine, range(step - 1, step))
        if particle() != 1:
            (folder / "met without it").touch()
            time.sleep(3)
            train(case, engine, range(step, step + 2))
        return records, working_weights(engine), engine.global_steps


@pytest.mark.parametrize(
    ("policy", "missed", "counts"),
    [pytest.param(*p, marks=SLOW) for p in [("skip", 1, False), ("async", 1, True), ("async", 0, False)]],
)
def test_nobody_waits_long_for_a_straggler(pool: Pool, tmp_path: Path, policy: str, missed: int, counts: bool) -> None:
    """Its work may count if it is of this swarm: whoever has synced nobody since the start may be as it was made."""
    case = elastic(CASE, straggler=policy, straggler_s=2.0, heartbeat_s=5.0)
    with lighthouse(join_s=2.0, heartbeat_s=5.0) as url:
        ranks = pool.run(be_slow, case, missed, tmp_path, world_size=3, env=places(url, 3, 1), timeout=LIMIT_S)
    present = [list(record["present"]) for record in ranks[0][0]]
    assert present == [*[[0, 1, 2]] * missed, [0, 2], [0, 1, 2]]
    recovered = [list(record["recovered"]) for record in ranks[0][0]]
    assert recovered == [*[[]] * missed, [], [] if counts else [1]]
    alive = [list(record["alive"]) for record in ranks[0][0]]
    assert alive[-1] == [True, counts, True]
    for _, weights, _ in ranks:
        assert_equal(weights, ranks[0][1])
    # Who is recovered goes on where the others are; whose work counts has made its own steps.
    last = case.interval * (missed + 2)
    assert [steps for *_, steps in ranks] == [last, last - 2 if counts else last, last]


def lose_the_donor(case: Case, folder: Path) -> Any:
    """Particle 1 misses a sync point; at the next, particle 0 is killed when it has given its state."""
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))
        synchronizer = swarm.session.synchronizer
        assert synchronizer is not None
        if particle() == 0:
            train(case, engine, range(3, 4))
            (folder / "met without it").touch()
            time.sleep(3)
            swarm.world.membership._vote = lambda: leave("killed")  # type: ignore[attr-defined]
            return train(case, engine, range(4, 6))
        wait_for(folder / "met without it")
        sync, seen = synchronizer.sync, []

        def watched(*arguments: Any) -> Any:
            seen.append([moment.clone().numpy() for moment in synchronizer.parts.shards.moments()])
            return sync(*arguments)

        synchronizer.sync = watched  # type: ignore[method-assign]
        train(case, engine, range(3, 4))
        seen.append([moment.clone().numpy() for moment in synchronizer.parts.shards.moments()])
        return seen, swarm.last_sync.to_json()


@pytest.mark.slow
def test_if_who_gives_is_lost_all_is_put_back(pool: Pool, tmp_path: Path) -> None:
    """The moments, too, which begin anew where a particle is recovered."""
    case = elastic(replace(CASE, particles=2), straggler="skip", straggler_s=2.0)
    with lighthouse(join_s=2.0) as url:
        outcomes = pool.outcomes(lose_the_donor, case, tmp_path, world_size=2, env=places(url, 2, 1), timeout=LIMIT_S)
    assert outcomes[0].kind == "Killed"
    (before, after), record = outcomes[1].get()
    assert list(record["present"]) == [1]
    assert before
    for a, b in zip(before, after, strict=True):
        assert np.any(a)
        np.testing.assert_array_equal(a, b)


# -- too few, and strangers -----------------------------------------------------------------------


@pytest.mark.slow
def test_too_few_particles(pool: Pool, url: str) -> None:
    case = elastic(replace(CASE, swarm=CASE.swarm | {"timeout_s": 4}), min_particles=3)
    outcomes = pool.outcomes(
        lose_one, case, 2, "steps", "killed", (0,), world_size=3, env=places(url, 3, 1), timeout=LIMIT_S
    )
    for outcome in outcomes[:2]:
        assert outcome.kind == "PeerError", outcome
        assert "fewer than swarm.elastic.min_particles = 3" in outcome.text


def differ(case: Case) -> Any:
    with swarm_of(case if particle() != 1 else replace(case, batch_norm=True)) as (_, engine):
        train(case, engine)
        return working_weights(engine)


@pytest.mark.slow
def test_another_model_is_sent_away(pool: Pool, url: str) -> None:
    outcomes = pool.outcomes(differ, CASE, world_size=3, env=places(url, 3, 1), timeout=LIMIT_S)
    assert outcomes[1].kind == "PeerError"
    assert "its model or config is not that of particle 0" in outcomes[1].text
    assert_equal(outcomes[0].get(), outcomes[2].get())


def be_intruded(case: Case, intrusions: int, folder: Path) -> Any:
    """Two particles train, until as many others claim their places, between two syncs, with another model."""
    intrudes, me = os.environ["DS_PSO_ATTEMPT"] != "0", particle()
    if intrudes:
        wait_for(folder / "runs 0", folder / "runs 1")
        ask = QuorumClient.request_quorum

        def ask_and_tell(*arguments: Any, **options: Any) -> Any:
            threading.Timer(0.5, (folder / f"asks {me}").touch).start()
            return ask(*arguments, **options)

        QuorumClient.request_quorum = ask_and_tell  # type: ignore[method-assign]
        case = replace(case, batch_norm=True)
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(3))
        (folder / f"runs {me}").touch()
        wait_for(*(folder / f"asks {place}" for place in range(intrusions)))
        train(case, engine, range(3, case.steps))
        return [(r["present"], r["recovered"], r["losses"]) for r in records], working_weights(engine)


@pytest.mark.slow
def test_intruders_of_another_model_take_no_place(pool: Pool, tmp_path: Path) -> None:
    """As many as those who run, started later and in their places: the swarm goes on as if nobody had come."""
    case = elastic(replace(CASE, particles=2), heartbeat_s=1.0)
    found = []
    for intruders in (0, 2):
        (folder := tmp_path / str(intruders)).mkdir()
        with lighthouse(heartbeat_s=1.0) as url:
            of = places(url, 4, 1, start=2)

            def env(rank: int, of: Callable[[int], Mapping[str, str]] = of) -> dict[str, str]:
                """Ranks 2 and 3 are told what ranks 0 and 1 are told, but for the attempt."""
                place = str(rank % 2)
                mine = {"LOCAL_RANK": place, "LAUNCHED_WORLD_SIZE": "2", "DS_PSO_PARTICLE": place}
                return {**of(rank), **mine, "DS_PSO_PARTICLES": "2", "DS_PSO_ATTEMPT": str(rank // 2)}

            found.append(
                pool.outcomes(be_intruded, case, intruders, folder, world_size=2 + intruders, env=env, timeout=LIMIT_S)
            )
    alone, intruded = found
    for here, there in zip(intruded[:2], alone, strict=True):
        (records, weights), (expected_records, expected) = here.get(), there.get()
        assert records == expected_records
        assert_equal(weights, expected)
    for outcome in intruded[2:]:
        assert outcome.kind == "PeerError", outcome
        assert "its model or config is not that of particle" in outcome.text


# -- the lighthouse -------------------------------------------------------------------------------


def train_slowly(case: Case, folder: Path) -> Any:
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            (folder / f"step {step} of {particle()}").touch()
            time.sleep(0.2)
        return records, working_weights(engine)


@pytest.mark.parametrize("comes_back", [True, False])
@SLOW
def test_the_lighthouse_is_lost(pool: Pool, tmp_path: Path, comes_back: bool) -> None:
    port = free_port()
    case = replace(CASE, steps=16)

    def lose() -> None:
        with lighthouse(port=port):
            wait_for(*(tmp_path / f"step 4 of {p}" for p in range(3)))
        if comes_back:
            time.sleep(1.5)
            with lighthouse(port=port):
                done.wait()

    done = threading.Event()
    keeper = threading.Thread(target=lose)
    keeper.start()
    try:
        outcomes = pool.outcomes(
            train_slowly, case, tmp_path, world_size=3, env=places(f"http://127.0.0.1:{port}", 3, 1), timeout=LIMIT_S
        )
    finally:
        done.set()
        keeper.join()
    for outcome in outcomes:
        if comes_back:
            records, weights = outcome.get()
            assert [list(record["present"]) for record in records] == [[0, 1, 2]] * 8
            assert_equal(weights, outcomes[0].get()[1])
        else:
            assert outcome.kind == "PeerError", outcome
            assert "does not answer" in outcome.text
