"""The figures: which lines, where they end, and that there are none without numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_runs import losses, small, start, sync, write

from ds_pso.report import figures, sync_figures
from ds_pso.report.reading import read_runs


@pytest.fixture
def read(tmp_path):
    def read(*runs):
        return read_runs([write(tmp_path / f"run{i}", records) for i, records in enumerate(runs)])

    return read


def lines(figure, panel=0):
    """Points of every line that has any, without NaN."""
    found = [np.array([line.get_xdata(), line.get_ydata()], float) for line in figure.axes[panel].lines]
    return [xy[:, np.isfinite(xy[1])].tolist() for xy in found if np.isfinite(xy[1]).any()]


def names(figure):
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def texts(figure, panel=0):
    return [text.get_text() for text in figure.axes[panel].texts]


def test_loss_over_steps(read):
    figure = figures.loss(read(small()), "steps")
    assert lines(figure) == [
        [[4, 8, 12], [4.0, 2.5, 1.5]],  # particle 0
        [[4, 8], [2.0, 2.0]],  # particle 1, whose last loss was not finite
        [[4, 8, 12], [3.0, 2.25, 1.5]],  # their mean
        [[0, 12], [8.0, 3.0]],  # held-out
        [[0, 12], [8.0, 5.0]],
    ]
    assert names(figure) == ["particle 0", "particle 1", "mean", "held-out"]


@pytest.mark.parametrize(
    ("axis", "x", "label"),
    [
        ("time", [3.0, 6.0, 9.0], "seconds since training began"),
        ("bytes", [3.0, 4.0, 5.0], "received by one rank, MB"),
    ],
)
def test_loss_over_what_it_costs(read, axis, x, label):
    figure = figures.loss(read(small()), axis)
    assert lines(figure)[-1] == [x, [3.0, 2.25, 1.5]]
    assert figure.axes[0].get_xlabel() == label


def test_runs_lie_over_one_another(read):
    other = [start(), *(sync(step, step / 2, [1.0, 3.0], bytes_received=0) for step in (4, 8, 16))]
    runs = read(small(), other)
    assert names(figures.loss(runs, "steps")) == ["run0", "run1"]
    assert lines(figures.loss(runs, "steps"))[-1] == [[4, 8, 16], [2.0, 2.0, 2.0]]
    assert names(figures.loss(runs, "bytes")) == ["run0"], "nothing is known of the other"
    caption = next(p.caption for p in figures.pictures(runs) if p.name == "loss_bytes")
    assert caption.endswith("Nothing is counted in run1.")


def test_a_run_may_have_any_name(tmp_path):
    runs = read_runs([write(tmp_path / name, small()) for name in ("_private", "$x_{$")])
    assert names(figures.loss(runs, "steps")) == ["_private", "$x_{$"]
    assert names(sync_figures.drift(runs)) == ["_private", "$x_{$"]


def test_a_run_has_its_color_in_every_figure(read):
    one_particle = [start(particles=1), losses("train", 4, 3.0, [2.0])]
    runs = read(one_particle, small())
    drift = sync_figures.drift(runs).axes[0].lines[0]
    loss = figures.loss(runs, "steps").axes[0].lines[-1]
    assert drift.get_color() == loss.get_color()


def test_held_out_and_the_exported_model(read):
    figure = figures.held_out(read(small()))
    assert lines(figure) == [[[0, 12], [8.0, 3.0]], [[0, 12], [8.0, 5.0]], [[0, 12], [8.0, 4.0]], [[12], [3.5]]]


def test_drift_bytes_and_bandwidth(read):
    runs = read(small())
    assert lines(sync_figures.drift(runs)) == [[[4, 8, 12], [2.0, 2.0, 2.0]]]
    assert lines(sync_figures.received(runs)) == [[[4, 8, 12], [3.0, 4.0, 5.0]]]
    assert lines(sync_figures.bandwidth(runs)) == [[[4, 8, 12], [64.0] * 3]]


def test_a_sync_point_that_moves_nothing_has_no_bandwidth(read):
    runs = read([start(), sync(4, 3.0, [1.0, 2.0]), sync(8, 4.0, [2.0, 1.0], bytes_received=24)])
    assert lines(sync_figures.bandwidth(runs)) == [[[4], [64.0]]]


def test_one_particle_with_an_outer_step(read):
    """Its loss and the time of the sync points; no drift, no bytes, and nobody to be better than."""
    points = [sync(step, step / 2, [9.0 - step], bytes_received=0, drift=None, weights=[1.0]) for step in (4, 8)]
    runs = read([start(particles=1, sync_points=True), *points])
    assert lines(figures.loss(runs, "steps"))[-1] == [[4, 8], [5.0, 1.0]]
    drawn = {name: figure is not None for name, _, _, figure in sync_figures.drawn(runs)}
    assert drawn == {
        "drift": False,
        "best": False,
        "rule": False,
        "sync_time": True,
        "bytes": False,
        "bandwidth": False,
    }


def test_who_was_best_and_who_was_not_finite(read):
    figure = sync_figures.best(read(small()))
    marks = {
        (line.get_marker(), row): xy for line in figure.axes[0].lines for row, xy in enumerate([line.get_xydata()])
    }
    assert marks["|", 0].tolist() == [[4, 1], [8, 1]]
    assert marks["x", 0].tolist() == [[12, 1]]
    assert texts(figure) == ["0 of 3", "2 of 3"]


def test_the_best_is_whom_the_rule_took(read):
    figure = sync_figures.best(read([start(), sync(4, 3.0, [1.0, 2.0], best=1)]))
    assert texts(figure) == ["0 of 1", "1 of 1"]


def test_what_the_rule_did(read):
    (run,) = read(small())
    figure = sync_figures.rule(run)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["weight in the consensus", "factor of the learning rate"]
    assert lines(figure, 0) == [[[4, 8, 12], [0.25, 0.5, 1.0]], [[4, 8, 12], [0.75, 0.5, 0.0]]]
    assert lines(figure, 1)[1] == [[4, 8, 12], [2.0, 4.0, 1.0]]


def test_a_rule_of_ones_own_shows_its_numbers(read):
    points = [sync(4 * i, float(i), [1.0, 2.0], my_force=0.5 * i, mode="x", sources=[0, 0], on=True) for i in (1, 2)]
    figure = sync_figures.rule(read([start(), *points])[0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["my force"]
    assert lines(figure) == [[[4, 8], [0.5, 1.0]]]


@pytest.mark.parametrize("odd", ["x", [1.0, "x"], {"a": 1}, [[1.0], [2.0]], [], None, True])
def test_notes_that_are_no_numbers_are_not_drawn(read, odd):
    points = [sync(4, 1.0, [1.0, 2.0], own=odd), sync(8, 2.0, [1.0, 2.0], own=odd)]
    assert sync_figures.rule(read([start(), *points])[0]) is None


def test_what_does_not_change_is_not_drawn(read):
    points = [sync(step, step, [1.0, 2.0], weights=[0.5, 0.5], pressure=0.1, next_interval=4) for step in (4, 8)]
    assert sync_figures.rule(read([start(), *points])[0]) is None


def bars(figure):
    """Heights of each part, by its name."""
    return {box.get_label(): [bar.get_height() for bar in box] for box in figure.axes[0].containers}


def test_time_at_sync_points(read):
    figure = sync_figures.sync_time(read(small()))
    parts = bars(figure)
    assert parts["waiting"] == [0.25] * 3
    assert parts["exchange"] == [0.125] * 3
    assert parts["other stop"] == [0.625, 0.125, 0.125]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(parts)[:3]


@pytest.mark.parametrize("staleness", [0, 2])  # 0: swarm.sync() right after it had begun
def test_time_of_a_delayed_sync_point_is_mostly_beside_training(read, staleness):
    late = {"staleness": staleness, "overlapped_s": 3.0, "seconds": 0.25, "waited_s": 1.0, "exchange_s": 2.0}
    parts = bars(sync_figures.sync_time(read([start(), sync(4, 3.0, [1.0, 2.0], **late)])))
    assert (parts["beside training"], parts["other stop"]) == ([3.0], [0.25])
    assert parts["waiting"] == parts["exchange"] == [0.0]


def test_short_times_are_in_milliseconds(read):
    points = [sync(4, 3.0, [1.0, 2.0], seconds=0.02, waited_s=0.004, exchange_s=0.006)]
    figure = sync_figures.sync_time(read([start(), *points]))
    assert figure.axes[0].get_title(loc="left") == "ms a sync point"
    assert bars(figure)["other stop"] == pytest.approx([10.0])


def test_many_sync_points_share_a_bar(read):
    points = [sync(4 * i, float(i), [1.0, 2.0], seconds=float(i), waited_s=0, exchange_s=0) for i in range(1, 151)]
    heights = bars(sync_figures.sync_time(read([start(), *points])))["other stop"]
    assert len(heights) == 50
    assert heights[0] == 2.0  # the mean of 1, 2 and 3 s


def test_nothing_to_show_gives_no_figure(read):
    nothing = {"drift": None, "bandwidth_mbit_s": None, "seconds": 0, "waited_s": 0, "exchange_s": 0}
    for records in ([start()], [start(), sync(4, 3.0, [None, None], bytes_received=0, **nothing)]):
        runs = read(records)
        assert [picture.name for picture in figures.pictures(runs)] == []


@pytest.mark.parametrize("particles", [1, 2, 6, 7, 64])
def test_any_number_of_particles(read, particles):
    values = [[1.0 + i / 100 + step for i in range(particles)] for step in range(3)]
    records = [start(particles=particles), *(sync(4 + 4 * i, i + 3.0, row) for i, row in enumerate(values))]
    figure = figures.loss(read(records), "steps")
    assert len(lines(figure)) == (particles + 1 if particles > 1 else 1)
    assert len(names(figure)) == (particles + 1 if 1 < particles <= 6 else particles > 1)
    assert math.isclose(lines(figure)[-1][1][0], np.mean(values[0]))
