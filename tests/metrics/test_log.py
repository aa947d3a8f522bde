"""metrics.jsonl: strict JSON whatever is logged, and a file that survives crashes and restarts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.metrics.log import MetricsLog, _plain, read_metrics


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_a_record_is_a_line(log):
    log.write("train", 3, {"losses": (1.0, 2.0), "name": "a\nb"})
    log.write("sync", 4, {})
    lines = log.path.read_text().splitlines()
    first, second = [json.loads(line) for line in lines]
    assert first == {"event": "train", "step": 3, "time_s": first["time_s"], "losses": [1.0, 2.0], "name": "a\nb"}
    assert second == {"event": "sync", "step": 4, "time_s": second["time_s"]}
    assert 0 <= first["time_s"] <= second["time_s"] < 60
    assert read_metrics(log.path) == [first, second]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_word_for_becomes_null(log, value):
    log.write("sync", 1, {"loss": value, "losses": (1.5, value), "nested": {"a": [value]}})
    (line,) = log.path.read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert (record["loss"], record["losses"], record["nested"]) == (None, [1.5, None], {"a": [None]})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(values)
def test_any_value_is_written_as_strict_json(value):
    json.loads(json.dumps(_plain(value), allow_nan=False), parse_constant=refuse)


def test_no_path_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None)
    log.write("train", 1, {})
    log.rewind(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3, 3]), (9, [1, 2, 3, 3, 4])])
def test_rewind_drops_what_came_after(log, step, kept):
    for taken in (1, 2, 3, 3, 4):
        log.write("train", taken, {"loss": math.nan})
    log.rewind(step)
    assert [record["step"] for record in read_metrics(log.path)] == kept
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_time_goes_on_from_where_it_was_rewound_to(log):
    log.path.parent.mkdir()
    log.path.write_text('{"event": "train", "step": 1, "time_s": 1000.0}\n')
    log.rewind(1)
    log.write("train", 2, {})
    assert 1000 <= read_metrics(log.path)[1]["time_s"] < 1060


def test_rewind_without_a_file(log):
    log.rewind(5)
    assert not log.path.exists()


def events(log):
    return [(record["event"], record["step"]) for record in read_metrics(log.path)]


def test_the_start_of_a_resumed_run_stands_where_it_goes_on(log):
    log.path.parent.mkdir()
    log.path.write_text(
        '{"event": "start", "step": 0, "time_s": 1.0, "ranks": 1}\n'
        '{"event": "sync", "step": 2, "time_s": 5.0}\n'
        '{"event": "sync", "step": 4, "time_s": 9.0}\n'
        '{"event": "start", "step": 0, "time_s": 1.5, "ranks": 3}\n'  # of a run that could not be resumed
    )
    log.write("start", 0, {"ranks": 2})  # by attach, which comes before load
    log.rewind(3)
    assert events(log) == [("start", 0), ("sync", 2), ("start", 3)]
    assert read_metrics(log.path)[-1] == {"event": "start", "step": 3, "time_s": 5.0, "ranks": 2}
    log.write("sync", 4, {})
    assert 5 <= read_metrics(log.path)[-1]["time_s"] < 65


def test_going_back_within_a_run_leaves_its_start_alone(log):
    log.write("start", 0, {})
    for step in (2, 4):
        log.write("sync", step, {})
    log.rewind(3)
    assert events(log) == [("start", 0), ("sync", 2)]


def test_what_comes_after_a_line_that_was_cut_short_is_read(log):
    log.path.parent.mkdir()
    log.path.write_text('{"event": "sync", "st{"event": "start", "step": 0}\n{"event": "sync", "step": 2}\n')
    assert events(log) == [("sync", 2)]


@pytest.mark.parametrize("rest", ["", "{", '{"event": "train", "st'])
def test_a_line_that_a_crash_cut_short_is_left_out_and_then_gone(log, rest):
    log.write("train", 1, {})
    with log.path.open("a") as file:
        file.write(rest)
    assert [record["step"] for record in read_metrics(log.path)] == [1]
    log.rewind(1)
    log.write("train", 2, {})
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2]
