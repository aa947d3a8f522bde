"""The figures of a report, each with a sentence on what it shows; those of the losses are drawn here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ds_pso.metrics.records import Entry, LossRecord, SyncRecord
from ds_pso.report import sync_figures
from ds_pso.report.drawing import (
    FEW,
    GRID,
    INK,
    LIGHT,
    MUTED,
    POINTS,
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
from ds_pso.report.runs import Run, columns, mean

HEIGHT = 2.8  # inches

WithLosses = Entry[SyncRecord | LossRecord]


@dataclass(frozen=True)
class Picture:
    """A figure for the page and for a file of its own, ``name.png``."""

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Return the figures that have something to show, in the order of the page."""
    found = [
        ("loss_steps", "Loss over steps", _caption_of_losses(runs), loss(runs, "steps")),
        (
            "loss_time",
            "Loss over time",
            "The same over the time since training began: here waiting and exchanging count, too.",
            loss(runs, "time"),
        ),
        (
            "loss_bytes",
            "Loss over bytes received",
            "The same over what one rank, the leader, has received at sync points: further left is cheaper."
            + _without_bytes(runs),
            loss(runs, "bytes"),
        ),
        (
            "held_out",
            "Held-out loss",
            "Loss of each particle (thin) on data that none trains on, their mean (thick), "
            "and the exported model (diamond).",
            held_out(runs),
        ),
        *sync_figures.drawn(runs),
    ]
    return [Picture(name, title, caption, figure) for name, title, caption, figure in found if figure is not None]


@matplotlib.rc_context(STYLE)
def loss(runs: Sequence[Run], axis: str) -> Figure | None:
    """Draw training loss over "steps", "time" or "bytes"; None if there is none.

    A single run over steps also shows its held-out losses, and its sync points.
    """
    shows = {"bytes": lambda run: run.bytes_received, "time": lambda run: not run.is_simulated, "steps": lambda _: True}
    shown = [run for run in runs if shows[axis](run)]
    size, xlabel = _unit(shown, axis)
    place: dict[str, Callable[[Run, WithLosses], float]] = {
        "steps": lambda run, entry: entry.step,
        "time": lambda run, entry: (entry.time_s - run.begin_s) / size,
        "bytes": lambda run, entry: run.bytes_by(entry.step) / size,
    }
    figure, (axes,) = new_figure([HEIGHT])
    named = _curves(axes, runs, shown, lambda run: run.training, place[axis])
    if axis == "steps" and len(runs) == 1:
        named += _held_out_dots(axes, runs[0])
        if len(runs[0].syncs) <= 100:
            steps = [sync.step for sync in runs[0].syncs]
            axes.vlines(steps, 0, 1, transform=axes.get_xaxis_transform(), color=GRID, lw=0.6, zorder=0)
    finish(axes, named, title="loss", xlabel=xlabel)
    return figure if axes.lines else None


@matplotlib.rc_context(STYLE)
def held_out(runs: Sequence[Run]) -> Figure | None:
    """Draw held-out loss over steps; None if there is none."""
    figure, (axes,) = new_figure([HEIGHT])
    named = _curves(axes, runs, runs, lambda run: run.held_out, lambda _, entry: entry.step)
    for run in runs:
        if math.isfinite(run.exported_loss):
            color = INK if len(runs) == 1 else color_of(run.number)
            axes.plot([run.steps], [run.exported_loss], "D", color=color, markersize=5)
    finish(axes, named, title="loss", xlabel=STEPS)
    return figure if axes.lines else None


def _curves(
    axes: Axes,
    runs: Sequence[Run],
    shown: Sequence[Run],
    entries_of: Callable[[Run], Sequence[WithLosses]],
    place: Callable[[Run, WithLosses], float],
) -> list[tuple[Line2D, str]]:
    """Draw the mean of each run, and thin lines for its particles; these have a name if there is but one run."""
    found = []
    for run in shown:
        entries, alone = entries_of(run), len(runs) == 1
        x = thin([place(run, entry) for entry in entries])
        losses = {i: column for i, column in enumerate(columns(entries)) if any(map(math.isfinite, column))}
        alike = all(values == losses[min(losses)] for values in losses.values())
        if len(losses) > 1 and alike:  # after a consensus
            losses = {}
        named = alone and len(losses) <= FEW
        color = INK if alone else color_of(run.number)
        for particle, values in losses.items() if len(losses) > 1 else []:
            own = color_of(particle) if named else MUTED if alone else color
            width, alpha = (1.0, 1.0) if named else (0.5, 0.6)
            line = draw(axes, x, thin(values), color=own, lw=width, alpha=alpha, marker="")
            if named and line:
                found.append((line, f"particle {particle}"))
        line = draw(
            axes, x, thin([mean(entry.record.losses) for entry in entries]), color=color, ls=line_of(run.number)
        )
        if line:
            which = "mean" if len(losses) > 1 else f"particle {min(losses)}" if losses else "all particles"
            name = short(run.label) if not alone else which if run.num_particles > 1 else ""
            found.append((line, name))
    return found


def _held_out_dots(axes: Axes, run: Run) -> list[tuple[Line2D, str]]:
    """Draw the held-out losses of every particle, with one name for all."""
    steps, lines, rows = [entry.step for entry in run.held_out], [], columns(run.held_out)
    style: dict[str, Any] = {"lw": 1.0, "ls": ":", "marker": "o", "markersize": 4, "markeredgewidth": 1.0}
    style["markerfacecolor"] = LIGHT["paper"]
    rows = rows[:1] if all(losses == rows[0] for losses in rows) else rows
    for particle, losses in enumerate(rows):
        color = color_of(particle) if 1 < len(rows) <= FEW else INK
        lines.append(draw(axes, thin(steps), thin(losses), color=color, **style))
    return [(Line2D([], [], color=MUTED, **style), "held-out")] if any(lines) else []


def _unit(runs: Sequence[Run], axis: str) -> tuple[float, str]:
    """Return what to divide by, and the label of the axis."""
    if axis == "time":
        most = max((run.seconds for run in runs), default=0.0)
        size, unit = (3600.0, "hours") if most > 7200 else (60.0, "minutes") if most > 180 else (1.0, "seconds")
        return size, f"{unit} since training began"
    if axis == "bytes":
        size, unit = sync_figures.byte_unit(runs)
        return size, f"received by one rank, {unit}"
    return 1.0, STEPS


def _caption_of_losses(runs: Sequence[Run]) -> str:
    kinds = sorted({"sync point" if run.training is run.syncs else "evaluation" for run in runs if run.training})
    what = f"Mean training loss of each particle since the last {' or '.join(kinds)} (thin), and their mean (thick)"
    if any(run.uses_probe and run.training is run.syncs for run in runs):
        what = "Loss of each particle on the probe batch (thin), and their mean (thick)"
    alone = len(runs) == 1 and runs[0]
    if alone and alone.num_particles == 1:
        what = "Training loss"
    if alone and alone.held_out:
        what += ", and on held-out data (rings)"
    most = max((run.num_training for run in runs), default=0)
    thinned = f" Each point is the mean of {math.ceil(most / POINTS)} of them." if most > POINTS else ""
    grey = " Grey lines are sync points." if alone and 0 < len(alone.syncs) <= 100 else ""
    return f"{what}.{grey}{thinned}"


def _without_bytes(runs: Sequence[Run]) -> str:
    missing = [run.label for run in runs if not run.bytes_received]
    return f" Nothing is counted in {', '.join(missing)}." if missing else ""
