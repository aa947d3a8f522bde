"""What a user is told of each sync: the record, on every rank, when the sync has ended."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pool import Pool

from ds_pso.metrics.log import read_metrics
from ds_pso.metrics.records import SyncRecord
from ds_pso.sync import synchronizer

from .jobs import Case, swarm_of, train


def record_syncs(case: Case, folder: Any) -> tuple[list[SyncRecord], list[int], SyncRecord | None]:
    """The records, the step at which each came, and the last one."""
    records: list[SyncRecord] = []
    steps: list[int] = []
    with swarm_of(case, run_dir=folder) as (swarm, engine):
        assert swarm.last_sync is None
        swarm.on_sync(records.append)
        swarm.on_sync(lambda record: steps.append(engine.global_steps))
        train(case, engine)
        swarm.finish_pending()
        return records, steps, swarm.last_sync


@pytest.mark.parametrize(
    ("swarm", "steps"), [({}, [2, 4, 6]), ({"delay": 1}, [3, 5, 6])], ids=["blocking", "overlapped"]
)
def test_every_rank_gets_every_record_when_its_sync_has_ended(pool: Pool, tmp_path, swarm, steps):
    case = Case(interval=2, steps=6, swarm=swarm)
    ranks = pool.run(record_syncs, case, tmp_path)
    written = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "sync"]
    for records, at, last in ranks:
        assert [record.sync for record in records] == [0, 1, 2]
        assert at == steps
        assert last == records[-1]
        assert [record.losses for record in records] == [record.losses for record in ranks[0][0]]
    assert [line["step"] for line in written] == steps
    for line, record in zip(written, ranks[0][0], strict=True):
        values = {key: value for key, value in line.items() if key not in ("event", "step", "time_s")}
        assert values == json.loads(json.dumps(record.to_json()))


def raise_in_a_callback(case: Case) -> str:
    with swarm_of(case) as (swarm, engine):

        def fail(record: SyncRecord) -> None:
            raise ZeroDivisionError(f"in sync {record.sync}")

        swarm.on_sync(fail)
        try:
            train(case, engine)
        except ZeroDivisionError as error:
            return f"{error} after step {engine.global_steps}"
        return "nothing was raised"


def test_what_a_callback_raises_the_step_raises(pool: Pool):
    assert pool.run(raise_in_a_callback, Case(interval=2, steps=4)) == ["in sync 0 after step 2"] * 4


def fail_after_a_sync_has_ended(case: Case) -> tuple[str, list[int]]:
    """An overlapped sync ends, and the sync of the whole model that is due in the same step fails."""
    with swarm_of(case) as (swarm, engine):
        records: list[SyncRecord] = []
        swarm.on_sync(records.append)
        train(case, engine, range(2))
        sync = swarm.session.synchronizer
        assert sync.overlap.pending is not None

        def fail(*arguments: Any) -> None:
            raise ZeroDivisionError("the next sync")

        sync.overlap.needs_whole, sync.sync = True, fail
        try:
            train(case, engine, range(2, 3))
        except ZeroDivisionError as error:
            return str(error), [record.sync for record in records]
        return "nothing was raised", []


def test_a_record_is_not_lost_if_the_next_sync_fails(pool: Pool):
    found = pool.run(fail_after_a_sync_has_ended, Case(interval=2, steps=4, swarm={"delay": 1}))
    assert found == [("the next sync", [0])] * 4


class Clock:
    """Stands in for ``time`` in the synchronizer: time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleep = time.sleep

    def perf_counter(self) -> float:
        return self.now


def steps_of_a_second_and_callbacks_of_ten(case: Case) -> list[float]:
    """What the records say of an optimizer step."""
    clock = synchronizer.time = Clock()  # this process is the test's own
    records: list[SyncRecord] = []

    def take_ten_seconds(record: SyncRecord) -> None:
        records.append(record)
        clock.now += 10.0

    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(take_ten_seconds)
        for step in range(case.steps):
            clock.now += 1.0
            train(case, engine, range(step, step + 1))
        return [record.step_s for record in records]


def test_the_time_of_a_callback_is_not_that_of_a_step(pool: Pool):
    found = pool.run(steps_of_a_second_and_callbacks_of_ten, Case(interval=2, steps=6))
    assert found == [[1.0, 1.0, 1.0]] * 4
