"""Draws the figures of sync points: drift, the best particle, what the rule did, time, bytes and bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ds_pso.metrics.records import Entry, SyncRecord
from ds_pso.report.drawing import (
    FEW,
    GRID,
    INK,
    MUTED,
    POINTS,
    SERIES,
    STEPS,
    STYLE,
    color_of,
    draw,
    finish,
    line_of,
    new_figure,
    short,
    thin,
)
from ds_pso.report.runs import Run
from ds_pso.report.thinning import best_particle, is_number
from ds_pso.utils.units import choose_prefix

BARS = 60  # of a run at most
# What a rule notes, under the name of the record; a rule of one's own has other names.
NOTES = {
    "weights": "weight in the consensus",
    "lr_factors": "factor of the learning rate",
    "scores": "loss on the probe batch",
    "pressure": "pressure towards the others",
    "inertia": "inertia that was taken",
    "age": "sync points that the peer was behind",
    "next_interval": "steps to the next sync point",
}
DECIDED = ("lr_factors", "next_interval")  # by the rule or the schedule: fields of every record
NOT_DRAWN = {*(item.name for item in fields(SyncRecord)), "best", "sources", "from"} - {*DECIDED}

Drawn = tuple[str, str, str, Figure | None]


def drawn(runs: Sequence[Run]) -> list[Drawn]:
    """Return name, title, caption and figure of each; no figure where there is nothing to show."""
    alone = len(runs) == 1
    rules = [
        (
            "rule" if alone else f"rule_{run.number}",
            "What the rule did" if alone else f"What the rule did: {run.label}",
            "Numbers that the rule took or found at each sync point, where they changed.",
            rule(run),
        )
        for run in runs
    ]
    return [
        (
            "drift",
            "Drift between particles",
            "How far the particles were from what they received, root mean square, in percent of its norm: "
            "if it grows and grows, the interval is too long for the learning rate.",
            drift(runs),
        ),
        (
            "best",
            "Who was best",
            "The particle with the lowest loss at each sync point; a cross is a particle that was left out. "
            "With data alike for all, who is best is mostly chance.",
            best(runs),
        ),
        *rules,
        (
            "sync_time",
            "Time at sync points",
            "How long a sync point stopped training at the leader: waiting for the last peer, exchange, anything else; "
            "and what a delayed one did beside training.",
            sync_time(runs),
        ),
        (
            "bytes",
            "Bytes received",
            "What one rank, the leader, has received at sync points so far.",
            received(runs),
        ),
        (
            "bandwidth",
            "Bandwidth",
            "Bits received in a second inside the exchange, at the leader, where a sync point moved something.",
            bandwidth(runs),
        ),
    ]


def byte_unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.bytes_received for run in runs), default=0)
    size, prefix = choose_prefix(most, ("G", "M", "k"), at_least=2)
    return size, f"{prefix}B"


@matplotlib.rc_context(STYLE)
def drift(runs: Sequence[Run]) -> Figure | None:
    def points(run: Run) -> list[tuple[int, float]]:
        return [(sync.step, 100 * sync.record.drift) for sync in run.syncs]

    return _lines(runs, points, title="drift, %", from_zero=True)


@matplotlib.rc_context(STYLE)
def bandwidth(runs: Sequence[Run]) -> Figure | None:
    def points(run: Run) -> list[tuple[int, float]]:
        least = 0.01 * max((sync.record.bytes_received for sync in run.syncs), default=0)
        syncs = [] if run.is_simulated else run.syncs
        return [(sync.step, sync.record.bandwidth_mbit_s) for sync in syncs if sync.record.bytes_received > least]

    return _lines(runs, points, title="Mbit/s")


@matplotlib.rc_context(STYLE)
def received(runs: Sequence[Run]) -> Figure | None:
    size, unit = byte_unit(runs)

    def points(run: Run) -> list[tuple[int, float]]:
        steps = sorted({sync.step for sync in run.syncs}) if run.bytes_received else []
        some = steps[:: -max(1, math.ceil(len(steps) / POINTS))]  # with the last one
        return [(step, run.bytes_by(step) / size) for step in reversed(some)]

    return _lines(runs, points, title=unit, from_zero=True)


def _lines(
    runs: Sequence[Run],
    points: Callable[[Run], Sequence[tuple[float, float]]],
    *,
    title: str,
    from_zero: bool = False,
) -> Figure | None:
    """Draw a line for each run, over steps."""
    figure, (axes,) = new_figure([2.6])
    named = []
    for run in runs:
        x, y = (thin(values) for values in list(zip(*points(run), strict=True)) or ((), ()))
        line = draw(axes, x, y, color=color_of(run.number), ls=line_of(run.number))
        if line:
            named.append((line, short(run.label) if len(runs) > 1 else ""))
    finish(axes, named, title=title, xlabel=STEPS, from_zero=from_zero)
    return figure if axes.lines else None


@matplotlib.rc_context(STYLE)
def best(runs: Sequence[Run]) -> Figure | None:
    """Draw a row for each particle, with marks where it was best; None where fewer than two losses were known."""
    shown = [run for run in runs if any(particle is not None for particle in run.totals.winners)]
    if not shown:
        return None
    figure, rows = new_figure([0.8 + 0.26 * min(run.num_particles, 12) for run in shown])
    rows[0].set_xlim(0, 1.02 * max(run.steps for run in shown))
    for axes, run in zip(rows, shown, strict=True):
        winners = [best_particle(sync.record) for sync in run.syncs]
        some = slice(None, None, math.ceil(len(run.syncs) / 1000))
        names = run.num_particles <= 12
        for particle in range(run.num_particles):
            steps = [sync.step for sync, won in zip(run.syncs[some], winners[some], strict=True) if won == particle]
            color = color_of(particle) if run.num_particles <= FEW else SERIES[0]
            axes.axhline(particle, color=GRID, lw=0.6, zorder=0)
            size = max(2.5, min(11, 110 / run.num_particles))
            axes.plot(steps, [particle] * len(steps), "|", color=color, markersize=size, markeredgewidth=1.8)
            out = [sync.step for sync in run.syncs[some] if False in sync.record.alive[particle : particle + 1]]
            axes.plot(out, [particle] * len(out), "x", color=INK, markersize=min(5, size), markeredgewidth=1.2)
            if names:
                text = f"{run.totals.winners[particle]} of {run.num_syncs}"
                axes.annotate(
                    text,
                    (1, particle),
                    xycoords=axes.get_yaxis_transform(),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    color=color,
                )
        axes.set_ylim(run.num_particles - 0.4, -0.6)
        axes.grid(visible=False)
        if names:
            axes.set_yticks(range(run.num_particles))
        title = "particle" if len(shown) == 1 else f"{run.label}: particle"
        finish(axes, title=title, xlabel=STEPS if axes is rows[-1] else "")
    return figure


@matplotlib.rc_context(STYLE)
def rule(run: Run) -> Figure | None:
    """Draw what the rule noted, each kind of number in a frame of its own; None if nothing changed."""
    panels = [(key, _noted(run.syncs, key)) for key in _keys(run)]
    panels = [(key, values) for key, values in panels if _changes(values)][:6]
    if not panels:
        return None
    figure, rows = new_figure([1.7 if len(values) == 1 else 2.1 for _, values in panels])
    x = thin([sync.step for sync in run.syncs])
    for axes, (key, values) in zip(rows, panels, strict=True):
        named, few = [], 1 < len(values) <= FEW
        for particle, numbers in enumerate(values):
            color = color_of(particle) if few or len(values) == 1 else MUTED
            line = draw(axes, x, thin(numbers), color=color, lw=1.2 if len(values) > 1 else 1.8)
            if few and line:
                named.append((line, f"particle {particle}"))
        finish(axes, named, title=NOTES.get(key, key.replace("_", " ")), xlabel=STEPS if axes is rows[-1] else "")
    return figure


def _keys(run: Run) -> list[str]:
    noted = dict.fromkeys(key for sync in run.syncs for key in sync.record.note if key not in NOT_DRAWN)
    return [*(key for key in noted if key not in DECIDED), *DECIDED]


def _noted(syncs: Sequence[Entry[SyncRecord]], key: str) -> list[list[float]]:
    """Return one line of numbers, or one for each particle; none if it is something else."""
    found = [(getattr(sync.record, key) if key in DECIDED else None) or sync.record.note.get(key) for sync in syncs]
    if all(value is None or is_number(value) for value in found):
        return [[math.nan if value is None else float(value) for value in found]]
    rows = [value if isinstance(value, list) and all(map(is_number, value)) else [] for value in found]
    width = max(map(len, rows))
    if any(len(row) not in (0, width) for row in rows):
        return []
    return [[float(row[i]) if row else math.nan for row in rows] for i in range(width)]


def _changes(lines: Sequence[Sequence[float]]) -> bool:
    known = [value for line in lines for value in line if math.isfinite(value)]
    return len(known) > 0 and max(known) - min(known) > 1e-9


PARTS = {
    "waiting": SERIES[4],
    "exchange": SERIES[0],
    "other stop": MUTED,
    "beside training": SERIES[5],
}


@matplotlib.rc_context(STYLE)
def sync_time(runs: Sequence[Run]) -> Figure | None:
    """Draw a bar for each sync point, or the mean of neighbours; the times of a simulation mean nothing."""
    shown = [run for run in runs if run.syncs and not run.is_simulated]
    if not shown:
        return None
    figure, rows = new_figure([2.6 if len(shown) == 1 else 1.9] * len(shown))
    used = np.zeros(len(PARTS))
    for axes, run in zip(rows, shown, strict=True):
        times = np.array([_parts(sync.record) for sync in run.syncs])
        used += times.sum(axis=0)
        size = math.ceil(len(times) / BARS)
        groups = np.array_split(np.arange(len(times)), range(size, len(times), size))
        left = run.start.step if run.start and run.start.step < run.syncs[0].step else 0
        heights = np.array([times[group].mean(axis=0) for group in groups])
        factor, unit = (1000, "ms") if heights.sum(axis=1).max() < 1 else (1, "s")
        right = np.array([run.syncs[group[-1]].step for group in groups])
        width = np.diff(right, prepend=left)
        bottom = np.zeros(len(groups))
        for (name, color), height in zip(PARTS.items(), factor * heights.T, strict=True):
            axes.bar(right - width / 2, height, 0.8 * width, bottom, color=color, label=name)
            bottom += height
        axes.set_ylim(0, 1.1 * bottom.max() or 1.0)
        title = f"{unit} a sync point" if len(runs) == 1 else f"{run.label}: {unit} a sync point"
        finish(axes, title=title, xlabel=STEPS if axes is rows[-1] else "")
    if not used.any():
        return None
    handles, names = rows[0].get_legend_handles_labels()
    chosen = [
        (handle, name) for handle, name, time in zip(handles, names, used, strict=True) if time > 0.005 * used.sum()
    ]
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 2.2}  # above the title
    rows[0].legend(*zip(*chosen, strict=True), ncols=len(chosen), handlelength=0.9, columnspacing=1.2, **place)
    return figure


def _parts(sync: SyncRecord) -> list[float]:
    """Return the seconds of each of PARTS. What peers do in the background does not hold training up."""
    stop, waited, exchange, beside = (
        value if math.isfinite(value) else 0.0
        for value in (sync.seconds, sync.waited_s, sync.exchange_s, sync.overlapped_s)
    )
    if beside or sync.staleness:
        return [0.0, 0.0, stop, beside]
    return [waited, exchange, max(0.0, stop - waited - exchange), 0.0]
