"""Runs of any length: totals are exact, what is drawn is bounded, and a line that cannot be read is one warning."""

from __future__ import annotations

import json
import logging
import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from made_runs import losses, small, start, sync, write

from ds_pso.metrics import log as metrics_log
from ds_pso.metrics.log import MetricsLog, read_metrics
from ds_pso.metrics.records import Entry, LossRecord, SyncRecord
from ds_pso.report import thinning, write_report
from ds_pso.report.page import facts, render
from ds_pso.report.reading import read_runs
from ds_pso.report.runs import Run, mean
from ds_pso.report.thinning import Thinned, best_particle, join

LONG = 5000


def long_run(length: int = LONG) -> Iterator[dict[str, Any]]:
    """Every number different, and now and then one that is not known, a particle left out, and an evaluation."""
    random = np.random.default_rng(0)
    yield start()
    for i in range(length):
        first, second, seconds = (float(value) for value in random.uniform(0.5, 3.0, 3))
        alive = [True, i % 7 != 3]
        yield sync(
            4 * (i + 1),
            2.0 + i,
            [first, second if alive[1] else None],
            sync=i,
            alive=alive,
            bytes_received=1000 + i,
            seconds=seconds,
            drift=None if i % 5 == 0 else first / 100,
            weights=[first, second],
            guard="weighted" if i % 3 else "mean",
            **({} if alive[1] else {"left_out": {"1": f"reason {i}"}}),
        )
        if i % 2:
            yield losses("held_out", 4 * (i + 1), 2.5 + i, [first, second])


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Run, list[dict[str, Any]]]:
    records = list(long_run())
    (run,) = read_runs([write(tmp_path_factory.mktemp("long"), records)])
    return run, records[1:]


def test_totals_count_every_record(long):
    run, records = long
    syncs = [SyncRecord.from_json(record) for record in records if record["event"] == "sync"]
    held_out = [record for record in records if record["event"] == "held_out"]
    assert (run.num_syncs, run.steps, run.num_training) == (LONG, 4 * LONG, LONG)
    assert run.bytes_received == sum(record.bytes_received for record in syncs)
    assert run.stood_still_s == pytest.approx(sum(record.seconds for record in syncs), rel=1e-12)
    assert run.seconds == records[-1]["time_s"] - 2.0
    assert run.totals.winners == {
        winner: [best_particle(sync) for sync in syncs].count(winner) for winner in (0, 1, None)
    }
    assert run.final_loss == mean(syncs[-1].losses)
    assert run.final_held_out == mean(held_out[-1]["losses"])
    said = " ".join(facts(run))
    assert f"weighted mean at {sum(i % 3 > 0 for i in range(LONG))} of {LONG} sync points" in said
    out = [i for i in range(LONG) if i % 7 == 3]
    assert f"Particle 1 was left out of {len(out)} sync points; last because reason {out[-1]}." in said


def test_what_is_drawn_is_bounded_and_the_mean_of_what_was_there(long):
    run, records = long
    assert thinning.LIMIT <= len(run.syncs) <= 2 * thinning.LIMIT + 2
    assert thinning.LIMIT <= len(run.held_out) <= 2 * thinning.LIMIT + 2
    assert [entry.step for entry in run.entries] == sorted(entry.step for entry in run.entries)
    size, syncs = 4, [record for record in records if record["event"] == "sync"]
    for number in (0, 17, 1000):
        found, of = run.syncs[number], syncs[size * number : size * (number + 1)]
        assert (found.step, found.time_s) == (of[-1]["step"], of[-1]["time_s"])
        assert found.record.losses[0] == pytest.approx(np.mean([record["losses"][0] for record in of]))
        assert found.record.seconds == pytest.approx(np.mean([record["seconds"] for record in of]))
        assert found.record.note["weights"][1] == pytest.approx(np.mean([record["weights"][1] for record in of]))
        assert found.record.bytes_received == sum(record["bytes_received"] for record in of)
    assert run.bytes_by(4 * 2000) == sum(1000 + i for i in range(2000))


def test_a_short_run_is_drawn_as_it_is(tmp_path):
    records = list(long_run(thinning.LIMIT))
    (run,) = read_runs([write(tmp_path, records)])
    syncs = [SyncRecord.from_json(record) for record in records if record["event"] == "sync"]
    assert repr([entry.record.losses for entry in run.syncs]) == repr([record.losses for record in syncs])


def test_neighbours_are_joined_by_what_is_known():
    first = SyncRecord(0, [1.0, math.nan], [True, False], {"1": "a"}, drift=math.nan, seconds=1.0, bytes_received=5)
    second = SyncRecord(1, [3.0, 4.0, 5.0], [True, True], seconds=3.0, bytes_received=6, note={"best": 2, "x": "y"})
    joined = join([first, second])
    assert (joined.sync, joined.losses, joined.alive, joined.left_out) == (
        1,
        [2.0, 4.0, 5.0],
        [True, False],
        {"1": "a"},
    )
    assert (joined.seconds, joined.bytes_received, joined.note) == (2.0, 11, {"best": 2, "x": "y"})
    assert math.isnan(joined.drift)
    assert join([LossRecord([1.0]), LossRecord([2.0, 3.0])]) == LossRecord([1.5, 3.0])


def test_memory_does_not_grow_with_the_run():
    """Of what is kept: less than twice as much for five times as many records."""

    def kept(length: int) -> int:
        thinned = Thinned()
        tracemalloc.start()
        for i in range(length):
            thinned.add(i, Entry("train", i, float(i), LossRecord([float(i), 2.0 * i])))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(list(thinned.entries())) <= 2 * thinning.LIMIT + 2
        return size

    assert kept(20_000) < 2 * kept(4_000)


# -- lines that cannot be read ------------------------------------------------------------------

GOOD = [json.dumps(record) for record in small()]
BASE = {"event": "sync", "step": 6, "time_s": 6.0, "losses": [2.0, 2.0], "alive": [True, True]}


def line(**values: Any) -> str:
    return json.dumps({**BASE, **values})


ODD = {
    "digits": line().replace('"step": 6', '"step": ' + "9" * 5000),
    "many digits": line(step=10**400),
    "a large step": line(step=10**30),
    "large bytes": line(bytes_received=10**40),
    "a negative step": line(step=-4),
    "large losses": line(losses=[1e308, 1e308], drift=1e308, weights=[1e308, 10**400]),
    "large time": line(time_s=1e308),
    "deep": line().replace('"alive"', '"deep": ' + "[" * 100_000 + "]" * 100_000 + ', "alive"'),
    "not so deep": line().replace('"alive"', '"deep": ' + '{"a": ' * 400 + "1" + "}" * 400 + ', "alive"'),
    "a deep start": json.dumps({**small()[0], "swarm": 0}).replace(
        '"swarm": 0', '"swarm": ' + '{"a": ' * 300 + "{}" + "}" * 300
    ),
    "NUL": "\0" * 1000,
    "cut short": line()[:40],
    "no text": b"\xff\xfe" + line().encode(),
    "another type": line(losses="all"),
    "no object": "[1, 2]",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("place", [3, len(GOOD)], ids=["inside", "at the end"])
def test_an_odd_line_is_one_warning(tmp_path, caplog, odd, place):
    odd = odd if isinstance(odd, bytes) else odd.encode()
    lines = [text.encode() for text in GOOD]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:place], odd, odd, *lines[place:]]))
    runs = read_runs([tmp_path])
    render(runs, [])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'metrics.jsonl'}: line {place + 1}: ")
    assert said.endswith("; and 1 more such lines")
    assert len(said) < 300


def test_the_largest_numbers_are_drawn(tmp_path):
    largest = line(losses=[9e99, -9e99], drift=9e99, seconds=9e99, bytes_received=10**18, weights=[9e99, 1])
    (tmp_path / "metrics.jsonl").write_text("\n".join([*GOOD[:3], ODD["large losses"], largest, *GOOD[3:]]))
    assert write_report([tmp_path], images=False).exists()


@pytest.mark.parametrize("text", ["-0", "-0.0", "0.0", "6.0"])
def test_odd_ways_to_write_a_number(tmp_path, caplog, text):
    lines = [*GOOD[:3], line(sync=0).replace('"step": 6', f'"step": {text}'), *GOOD[3:]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = read_runs([tmp_path])
    assert run.num_syncs == 4
    assert not caplog.records


def test_a_line_without_end_is_read_in_pieces(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics_log, "_LONGEST", 4096)
    huge = line(mine="x" * 50_000)
    for lines in ([*GOOD[:3], huge, *GOOD[3:]], [*GOOD, huge]):
        caplog.clear()
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        (run,) = read_runs([tmp_path])
        assert run.num_syncs == 3
        (said,) = [record.getMessage() for record in caplog.records]
        assert f"line {lines.index(huge) + 1}: is left out" in said


def test_what_is_written_meanwhile_is_for_the_next_report(tmp_path, monkeypatch):
    """The file is read twice, and must be the same both times."""
    folder = write(tmp_path, small())
    real = thinning.Totals.add

    def add(self: Any, entry: Any) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(start(0, 0.1)) + "\n" + line(step=16) + "\n")
        real(self, entry)

    monkeypatch.setattr(thinning.Totals, "add", add)
    (run,) = read_runs([folder])
    assert (run.num_syncs, run.steps) == (3, 12)


def test_a_resumed_run_reads_its_log_line_by_line(tmp_path, caplog):
    """And keeps every other line as it is, odd numbers included."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*GOOD[:3], ODD["digits"], line(mine=10**30), "7", "\0\0", *GOOD[3:]]) + "\n")
    MetricsLog(path).rewind(8)
    assert [record["step"] for record in read_metrics(path)] == [0, 0, 4, 6, 8]
    assert read_metrics(path)[3]["mine"] == 10**30
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
