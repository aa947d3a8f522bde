"""Schedules with real processes: when particles sync, how far apart they are then, and what the monitor says."""

from __future__ import annotations

import csv
import itertools
import math
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

from .jobs import (
    Case,
    Weights,
    assert_close,
    assert_equal,
    one_after_the_other,
    place,
    swarm_of,
    train,
    working_weights,
)
from .oracle import train_particles

ADAPTIVE = {"type": "adaptive", "drift": 0.02, "compute_share": 0}


@dataclass
class Life:
    records: list[dict[str, Any]]  # of the sync points
    steps: list[int]  # after which they were logged
    before: list[np.ndarray]  # this rank's shards when each of them began
    weights: Weights


def flat(swarm: Any) -> np.ndarray:
    swarm.session.synchronizer.parts.shards.zero_padding()
    return np.concatenate(
        [t.numpy().ravel().astype(np.float64) for t in swarm.session.synchronizer.parts.shards.tensors]
    )


def lives(cases: list[Case]) -> list[Life]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        life = Life([], [], [], {})

        def note(record: Any, life: Life = life, engine: Any = engine) -> None:
            life.records.append(record.to_json())
            life.steps.append(engine.global_steps)

        def look(begin: Any, life: Life = life, swarm: Any = swarm) -> Any:
            def wrapped(step: int) -> None:
                life.before.append(flat(swarm))
                begin(step)

            return wrapped

        swarm.on_sync(note)
        schedule = swarm.session.synchronizer.parts.schedule
        schedule.begin = look(schedule.begin)
        train(case, engine)
        swarm.world.background.settle()
        life.weights = working_weights(engine)
        found.append(life)
    return found


def drifts(ranks: list[Life], particle_size: int) -> list[float]:
    """Of each sync point, from the weights of all ranks: sqrt(mean of |x_i - mean|^2 / |mean|^2)."""
    found = []
    for sync_point in zip(*(rank.before for rank in ranks), strict=True):
        apart = norm = 0.0
        for shard in range(particle_size):
            x = np.stack(sync_point[shard::particle_size])
            mean = x.mean(0)
            apart += ((x - mean) ** 2).sum(1).mean()
            norm += (mean**2).sum()
        found.append(float(np.sqrt(apart / norm)))
    return found


@pytest.mark.parametrize(("stage", "particles"), slow_but([(3, 2)], [(0, 2), (1, 2), (2, 4), (3, 2)]))
def test_the_drift_is_the_distance_of_the_particles_to_their_mean(pool: Pool, stage: int, particles: int) -> None:
    cases = [
        Case(stage=stage, particles=particles, steps=8, interval=2, **options)
        for options in (
            {},
            {"swarm": {"delay": 1}},
            {"swarm": {"bucket_mb": 40 / 2**20}},
            {"sync_mode": "easgd"},
            {"sync_mode": "swarm", "options": {"guard": False}},
        )
    ]
    for case, ranks in zip(cases, zip(*pool.run(lives, cases, world_size=4), strict=True), strict=True):
        truth = drifts(ranks, 4 // particles)
        for rank in ranks:
            assert [record["drift"] for record in rank.records] == [record["drift"] for record in ranks[0].records]
            known = [record["drift"] for record in rank.records]
            assert known == pytest.approx(truth[: len(known)], rel=1e-4), case
            late = case.swarm.get("delay", 0)
            assert [r["staleness"] for r in rank.records] == [late] * len(known)


def test_the_drift_leaves_out_who_is_not_alive(pool: Pool) -> None:
    ranks = pool.run(with_a_dead_particle, Case(particles=4, interval=2, steps=2), world_size=4)
    x = np.stack([rank[1] for rank in ranks])[[0, 1, 3]]
    expected = np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean() / (x.mean(0) ** 2).sum())
    assert [rank[0] for rank in ranks] == pytest.approx([expected] * 4, rel=1e-4)


def with_a_dead_particle(case: Case) -> tuple[float, np.ndarray]:
    with swarm_of(case) as (swarm, engine):
        drift: list[float] = []
        swarm.on_sync(lambda record: drift.append(record.drift))
        train(case, engine, range(1))
        if swarm.particle == 2:
            swarm.session.synchronizer.parts.shards.tensors[0][:3] = float("nan")
        schedule, before = swarm.session.synchronizer.parts.schedule, []
        schedule.begin = lambda step: before.append(flat(swarm))
        train(case, engine, range(1, 2))
        return drift[0], before[0]


def test_all_ranks_adapt_alike(pool: Pool) -> None:
    """The interval follows the drift, which is what the oracle would have seen, too."""
    cases = [
        Case(stage=stage, particles=2, steps=40, interval=1, swarm={"schedule": ADAPTIVE, "total_steps": 40, **more})
        for stage, more in ((2, {}), (3, {"wire": "int8"}))
    ]
    for ranks in zip(*pool.run(lives, cases, world_size=4), strict=True):
        for rank in ranks:
            assert rank.steps == ranks[0].steps
            gaps = np.diff([0, *rank.steps])
            assert len(set(gaps)) > 2, "else nothing has adapted"
            assert rank.steps[-1] == 40
            said = [record["next_interval"] for record in rank.records]
            assert list(gaps[1:]) == said[:-1]
            wish = 1.0
            for record in rank.records[:-2]:
                wish = min(max(wish * min(max(0.02 / record["drift"], 0.5), 2.0), 1.0), 1024.0)
                assert record["next_interval"] == round(wish)


def test_a_warmup_is_synchronous_training(pool: Pool) -> None:
    """Syncing after every step with plain SGD is what an all-reduce of gradients makes; and then as the JSON says."""
    case = Case(optimizer="SGD", lr=0.1, steps=6, interval=4, seed=3)
    cases = [
        replace(case, swarm={"schedule": {"warmup_steps": 6}}),
        replace(case, interval=1),
        replace(case, swarm={"schedule": {"warmup_steps": 2}, "delay": 2}, steps=9),
    ]
    truth = train_particles(replace(case, interval=1))
    for warm, every, late in pool.run(lives, cases, world_size=4):
        assert warm.steps == [1, 2, 3, 4, 5, 6]
        assert_equal(warm.weights, every.weights)
        assert_close(warm.weights, truth[0], rtol=1e-4, atol=1e-5)
        assert late.steps == [1, 2, 6], "applied: at once in the warm-up; the one of step 8 is still pending"
        assert [record["staleness"] for record in late.records] == [0, 0, 2]


def test_a_wall_time_interval_counts_the_slowest_particle(pool: Pool) -> None:
    ranks = pool.run(slow_particle, Case(interval=1, steps=12), world_size=4)
    for records in ranks:
        first, *others = records
        assert math.isnan(first["step_s"]), "it contains whatever comes before training"
        assert (first["step"], first["next_interval"]) == (1, 1)
        assert all(record["step_s"] > 0.09 for record in others), "particle 1 takes a tenth of a second and a bit"
        for before, record in itertools.pairwise(records):
            assert record["step"] == before["step"] + before["next_interval"]
            assert record["next_interval"] == max(1, round(0.3 / record["step_s"]))
        assert [r["step_s"] for r in others] == [r["step_s"] for r in ranks[0][1:]]


def slow_particle(case: Case) -> list[dict[str, Any]]:
    case = replace(case, swarm={"schedule": {"type": "wall_time", "seconds": 0.3}})
    with swarm_of(case) as (swarm, engine):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json() | {"step": engine.global_steps}))
        for step in range(case.steps):
            time.sleep(0.1 * swarm.particle)
            train(case, engine, range(step, step + 1))
        return records


def at_its_own_pace(case: Case, training_s: float, sync_point_s: float) -> list[dict[str, Any]]:
    """Particle 1 needs so long for a step; whatever a sync point needs takes so long on all."""
    with swarm_of(case) as (swarm, engine):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json() | {"step": engine.global_steps}))
        publish = swarm.session.synchronizer.parts.shards.publish

        def slow_publish() -> None:
            time.sleep(sync_point_s)
            publish()

        swarm.session.synchronizer.parts.shards.publish = slow_publish
        for step in range(case.steps):
            if step == 5 and swarm.particle == 1:
                time.sleep(1.0)  # an evaluation
            time.sleep(training_s * swarm.particle)
            train(case, engine, range(step, step + 1))
        return records


def test_time_for_training_is_left(pool: Pool) -> None:
    """0.4 s of a sync point against steps of 0.1 s and a bit: at a share of a half that is nearly 4 steps."""
    schedule = {"type": "adaptive", "drift": 1e-9, "compute_share": 0.5}
    ranks = pool.run(at_its_own_pace, Case(interval=3, steps=16, swarm={"schedule": schedule}), 0.1, 0.4, world_size=4)
    for records in ranks:
        assert [r["step_s"] for r in records] == [r["step_s"] for r in ranks[0]]
        assert [r["next_interval"] for r in records] == [r["next_interval"] for r in ranks[0]]
        assert all(0.1 <= record["step_s"] < 0.4 for record in records), "neither the second nor the sync points count"
        wanted, held_up = 3.0, 0.0  # nothing has held training up before
        for number, record in enumerate(records):
            wanted = max(wanted / 2, 1.0, math.ceil(held_up / record["step_s"] - 1e-9))  # they drift too far anyway
            assert record["next_interval"] == round(wanted)
            # Of a particle the slower rank; of the particles the one that others had to wait for.
            held_up = min(max(rank[number]["seconds"] for rank in ranks[first : first + 2]) for first in (0, 2))
            assert held_up >= 0.4


def survivors(case: Case) -> list[dict[str, Any]]:
    with swarm_of(case) as (swarm, engine):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine, range(4), spoil=lambda step, loss: loss * float("nan") if swarm.particle == 1 else loss)
        return records


def test_one_survivor_is_no_reason_to_meet_less_often(pool: Pool) -> None:
    schedule = {"type": "adaptive", "drift": 10.0, "compute_share": 0}
    for records in pool.run(survivors, Case(interval=2, steps=4, swarm={"schedule": schedule}), world_size=4):
        found = [(r["alive"], math.isnan(r["drift"]), r["next_interval"]) for r in records]
        assert found == [((True, False), True, 2)] * 2


def interrupted(case: Case, folder: Path) -> tuple[list[float], list[float]]:
    """What a pending sync point knows of the times, and what the run that goes on with it makes of that."""
    records: list[dict[str, Any]] = []
    known: list[float] = []
    for number, (_, swarm, engine) in enumerate(one_after_the_other([case, case])):
        if number == 0:
            train(case, engine, range(5))
            swarm.save(folder)
            known = list(astuple(swarm.session.synchronizer.overlap.pending.pace))
        else:
            swarm.on_sync(lambda record: records.append(record.to_json()))
            swarm.load(folder)
            train(case, engine, range(5, 6))
    return known, [record["step_s"] for record in records]


def test_the_times_of_a_pending_sync_point_are_saved(pool: Pool, tmp_path: Path) -> None:
    case = Case(interval=4, steps=8, swarm={"delay": 2, "schedule": {"type": "wall_time", "min_interval": 2}})
    for known, step_s in pool.run(interrupted, case, tmp_path, world_size=4):
        assert known[0] > 0
        assert step_s == known[:1]


def test_the_next_interval_counts_from_the_beginning(pool: Pool) -> None:
    cases = [
        Case(steps=10, interval=4, swarm={"delay": 4}),
        Case(steps=14, interval=4, swarm={"delay": 4, "schedule": ADAPTIVE | {"drift": 1e-9, "min_interval": 4}}),
        Case(steps=17, interval=4, swarm={"delay": 4, "schedule": ADAPTIVE | {"drift": 1e9, "min_interval": 4}}),
    ]
    for fixed, shrinking, growing in pool.run(lives, cases, world_size=4):
        for life, steps, intervals in ((fixed, [8], [4]), (shrinking, [8, 12], [4, 4]), (growing, [8, 16], [8, 16])):
            assert life.steps == steps, "what is due is applied before anybody asks when to sync next"
            assert [record["next_interval"] for record in life.records] == intervals


def monitored(case: Case, folder: Path) -> list[dict[str, Any]]:
    with swarm_of(case) as (swarm, engine):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine)
        return records


def read(path: Path) -> list[tuple[int, float]]:
    with path.open() as file:
        return [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]


def test_deepspeeds_monitor_shows_sync_points(pool: Pool, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    case = Case(steps=4, interval=2, deepspeed={"csv_monitor": section})
    records = pool.run(monitored, case, tmp_path, world_size=4)[0]
    first, other = tmp_path / "job" / "particle_0", tmp_path / "job" / "particle_1"
    samples = [16, 32]  # of a particle: eight in a step
    for name in ("drift", "bytes_received", "seconds", "bandwidth_mbit_s"):
        assert read(first / f"Swarm_{name}.csv") == [
            (at, pytest.approx(record[name])) for at, record in zip(samples, records, strict=True)
        ]
    for particle in range(2):
        expected = [(at, record["losses"][particle]) for at, record in zip(samples, records, strict=True)]
        assert read(first / f"Swarm_loss_particle_{particle}.csv") == expected
    assert not list(other.glob("Swarm*")), "the leader's are enough"
    for folder in (first, other):
        assert list(folder.glob("Train*")), "DeepSpeed's own are those of each particle"


def monitored_with_a_dead_particle(case: Case) -> None:
    with swarm_of(case) as (_, engine):
        train(case, engine, spoil=lambda step, loss: loss * float("nan") if place(case)[0] == 1 else loss)


def test_the_monitor_is_spared_what_is_no_number(pool: Pool, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    pool.run(monitored_with_a_dead_particle, Case(deepspeed={"csv_monitor": section}), world_size=4)
    shown = {path.name for path in (tmp_path / "job" / "particle_0").glob("Swarm*")}
    assert {"Swarm_loss_particle_0.csv", "Swarm_seconds.csv"} <= shown
    assert not shown & {"Swarm_loss_particle_1.csv", "Swarm_drift.csv"}
