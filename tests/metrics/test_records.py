"""Records: what is written can be read, also when an older version or a rule of one's own has added to it."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_pso.metrics import deepspeed_monitor
from ds_pso.metrics.log import MetricsLog, _plain, read_metrics
from ds_pso.metrics.records import (
    LossRecord,
    StartRecord,
    SyncRecord,
    _checked,
    entry_from_json,
    plain_sync,
    tame,
)

FULL = SyncRecord(
    sync=3,
    losses=[1.5, 2.5],
    alive=[True, False],
    left_out={"1": "its loss is not finite"},
    restored={"0": "layer.mask"},
    drift=0.25,
    staleness=2,
    next_interval=8,
    seconds=0.5,
    waited_s=0.125,
    exchange_s=0.25,
    overlapped_s=1.5,
    step_s=0.0625,
    bytes_received=1024,
    bandwidth_mbit_s=64.0,
    repeated=1,
    lr_factors=[1.0, 2.0],
    present=[0, 1],
    recovered=[1],
    fragment=0,
    abandoned=False,
    fragments_staleness=[1, 2],
    fragments_s=[0.5, 0.75],
    same_samples=[[0, 1]],
    expert_load_distances=[0.125, 0.0625],
    moments=["first"],
    note={"weights": [0.25, 0.75], "guard": "mean"},
)
LEAST = {"losses": [1.0, None]}


def read(values):
    return SyncRecord.from_json(json.loads(json.dumps(values)))


def test_what_is_written_can_be_read(tmp_path):
    assert read(FULL.to_json()) == FULL
    assert all(getattr(FULL, item.name) != item.default for item in fields(SyncRecord)), "every field has a value"
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("sync", 16, FULL.to_json())
    entry = entry_from_json(read_metrics(log.path)[0])
    assert (entry.event, entry.step, entry.record) == ("sync", 16, FULL)


def test_what_has_no_meaning_is_not_written():
    written = SyncRecord(sync=0, losses=(1.0,), alive=(True,)).to_json()
    assert not {"left_out", "lr_factors", "present", "recovered", "fragment", "abandoned", "note"} & written.keys()
    assert math.isnan(written["drift"])


def test_older_versions_wrote_less():
    record = read(LEAST)
    assert (record.losses[0], list(record.alive), record.recovered, record.note) == (1.0, [], None, {})
    assert math.isnan(record.losses[1])
    assert math.isnan(record.drift)


def test_older_versions_had_another_word_for_recovered():
    record = read(LEAST | {"present": [0, 1], "healed": [1]})
    assert (record.recovered, record.note) == ([1], {})


def test_what_was_measured_goes_before_a_note():
    record = SyncRecord(0, [1.0, 2.0], [True, True], seconds=3.0, note={"seconds": 0.0, "own": 1})
    assert (record.to_json()["seconds"], record.to_json()["own"]) == (3.0, 1)


def test_null_is_not_finite():
    record = read(LEAST | dict.fromkeys(("drift", "seconds", "bandwidth_mbit_s", "step_s")))
    assert all(map(math.isnan, (record.drift, record.seconds, record.bandwidth_mbit_s, record.step_s)))


@pytest.mark.parametrize("values", [{"own": [1, "x"]}, {"step_s": "x"}, {"next_interval": 2.5, "lr_factors": "all"}])
def test_what_is_no_field_is_the_rules(values):
    record = read(LEAST | values)
    assert record.note == values
    assert (record.next_interval, record.lr_factors) == (0, ())


@pytest.mark.parametrize(
    "values",
    [{"losses": "x"}, {"alive": None}, {"drift": "x"}, {"bytes_received": -1}, {"seconds": []}, {"left_out": {"0": 1}}],
)
def test_what_reports_show_must_be_right(values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        read(LEAST | {"step_s": "x"} | values)


@pytest.mark.parametrize("line", [3, [], {}, {"event": "mine", "step": -1, "time_s": 0}, {"event": "start", "step": 0}])
def test_a_line_that_is_no_entry_is_refused(line):
    with pytest.raises(ValidationError):
        entry_from_json(line)


def test_the_event_says_what_a_line_holds():
    stamp = {"step": 4, "time_s": 1.5}
    start = {"description": "2 particles", "particles": 2, "ranks": 1, "later": 1}
    assert entry_from_json({"event": "start", **stamp, **start}).record == StartRecord("2 particles", 2, 1)
    for event in ("train", "held_out", "exported", "mine"):
        assert entry_from_json({"event": event, **stamp, "losses": [2.0]}).record == LossRecord([2.0])
    own = entry_from_json({"event": "mine", **stamp, "record": "x", "losses": 3})
    assert (own.step, own.time_s, own.record) == (4, 1.5, {"record": "x", "losses": 3})


def test_numbers_for_deepspeeds_monitor():
    events = deepspeed_monitor.events(FULL, 640)
    assert {samples for _, _, samples in events} == {640}
    assert {name: value for name, value, _ in events} == {
        "Swarm/drift": 0.25,
        "Swarm/staleness": 2,
        "Swarm/next_interval": 8,
        "Swarm/seconds": 0.5,
        "Swarm/waited_s": 0.125,
        "Swarm/overlapped_s": 1.5,
        "Swarm/exchange_s": 0.25,
        "Swarm/step_s": 0.0625,
        "Swarm/bytes_received": 1024,
        "Swarm/bandwidth_mbit_s": 64,
        "Swarm/loss/particle_0": 1.5,
        "Swarm/loss/particle_1": 2.5,
        "Swarm/alive/particle_0": 1,
        "Swarm/alive/particle_1": 0,
        "Swarm/weight/particle_0": 0.25,
        "Swarm/weight/particle_1": 0.75,
        "Swarm/lr_factor/particle_0": 1,
        "Swarm/lr_factor/particle_1": 2,
        "Swarm/expert_load_distance/particle_0": 0.125,
        "Swarm/expert_load_distance/particle_1": 0.0625,
    }
    assert all(type(value) is float for _, value, _ in events)


def test_the_monitor_gets_nothing_that_is_not_finite():
    events = deepspeed_monitor.events(SyncRecord(0, losses=(math.nan, 1.0), alive=(False, True)), 0)
    names = {name for name, _, _ in events}
    assert not {"Swarm/drift", "Swarm/bandwidth_mbit_s", "Swarm/overlapped_s", "Swarm/loss/particle_0"} & names
    assert {"Swarm/loss/particle_1", "Swarm/alive/particle_0"} <= names


# -- lines that are read without pydantic -----------------------------------------------------

real = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3) | st.booleans() | st.text()
whole = st.integers(-2, 2**70) | st.none() | st.booleans() | st.floats(0, 3)
lines = st.fixed_dictionaries(
    {"event": st.just("sync"), "losses": st.lists(real, max_size=3)},
    optional={
        "step": whole,
        "time_s": real,
        "alive": st.lists(st.booleans() | whole, max_size=3),
        "left_out": st.dictionaries(st.text(max_size=2), st.text(max_size=2) | whole, max_size=2),
        "present": st.lists(whole, max_size=2),
        "abandoned": st.booleans() | st.none(),
        "healed": st.lists(st.integers(0, 3), max_size=2),
        "weights": st.lists(real, max_size=3),
        "best": whole,
        "mine": real | st.lists(st.lists(real, max_size=2), max_size=2),
        **dict.fromkeys(("drift", "seconds", "step_s", "bandwidth_mbit_s"), real),
        **dict.fromkeys(("sync", "staleness", "bytes_received", "fragment", "next_interval"), whole),
        **dict.fromkeys(("lr_factors", "fragments_s"), st.lists(real, max_size=2)),
    },
)


@given(lines | st.fixed_dictionaries({"event": st.just("sync"), "step": st.integers(0, 9), "time_s": st.floats(0, 9)}))
def test_the_short_way_reads_what_pydantic_reads(line):
    found = plain_sync(line)
    if found is not None:
        assert repr(found) == repr(_checked(line)), "with NaN in it, which equals nothing"


def test_what_a_swarm_writes_takes_the_short_way():
    record = SyncRecord(
        sync=3,
        losses=(1.0, math.nan),
        alive=[True, False],
        left_out={"1": "its loss is not finite"},
        drift=0.1,
        lr_factors=[1.0, 2.0],
        present=[0, 1],
        recovered=[],
        fragment=2,
        abandoned=False,
        fragments_staleness=[4, 8],
        fragments_s=[0.1, 0.2],
        note={"weights": [0.5, 0.5], "guard": "weighted"},
    )
    line = {"event": "sync", "step": 8, "time_s": 1.5, **json.loads(json.dumps(_plain(record.to_json())))}
    assert repr(plain_sync(line)) == repr(_checked(line))
    assert plain_sync(line).record.note == record.note


@pytest.mark.parametrize(
    ("value", "tamed", "is_odd"),
    [
        (1e308, None, True),
        (-1e101, None, True),
        (1e100, 1e100, False),
        (-0.0, -0.0, False),
        (0, 0, False),
        (True, True, False),
        (10**18, 10**18, False),
        (-(10**19), None, True),
        (10**400, None, True),
        ("1e308", "1e308", False),
        ({"a": [1, {"b": [math.inf]}]}, {"a": [1, {"b": [None]}]}, True),
        ([None, 2.5], [None, 2.5], False),
    ],
    ids=lambda value: str(value)[:12],
)
def test_numbers_that_cannot_be_drawn_are_unknown(value, tamed, is_odd):
    assert tame(value) == (tamed, is_odd)
