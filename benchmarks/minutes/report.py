"""The page and the figure of what was run."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.convergence.grids import Stat
from benchmarks.minutes.clock import DECAY, WARMUP
from benchmarks.minutes.results import Outcome, Results, Run
from benchmarks.minutes.run import Plan, tried
from benchmarks.minutes.settings import ALONE, BANDWIDTHS, BATCH, BY_NAME, HELD_OUT, NUM_ENDS, ROWS, SEQ_LENGTH, Row
from ds_pso.utils.atomic_io import write_atomically

CLAIMS = Path(__file__).parent / "claims.md"
_COLOURS = {"torch": "0.3", "DeepSpeed": "C3", "DDP": "C4", "torchft": "C1", "ds_pso": "C0"}
_LINES = ["-", "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1))]

Curve = list[tuple[float, float]]  # (minutes, loss)


@dataclass(frozen=True)
class Reached:
    """The runs of a row over one bandwidth, seed by seed."""

    row: Row
    lr: float
    outcomes: list[Outcome]

    @property
    def curve(self) -> Curve:
        """Mean over the seeds, snapshot by snapshot."""
        curves = [parse_curve(outcome.curve) for outcome in self.outcomes]
        return [
            (statistics.fmean(t for t, _ in points), statistics.fmean(loss for _, loss in points))
            for points in zip(*curves, strict=False)
        ]

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(outcome, name) for outcome in self.outcomes)


def parse_curve(text: str) -> Curve:
    """Of ``Outcome.curve``."""
    return [(float(minutes), float(loss)) for minutes, loss in (point.split(":") for point in text.split())]


def minutes_to(curve: Curve, loss: float) -> float | None:
    """When the loss was reached, between two snapshots on a straight line; None if never."""
    before: tuple[float, float] | None = None
    for minutes, here in curve:
        if here <= loss:
            if before is None or before[1] == here:
                return minutes
            return before[0] + (minutes - before[0]) * (before[1] - loss) / (before[1] - here)
        before = (minutes, here)
    return None


def reached(rows: Mapping[Run, Outcome], plan: Plan, bandwidth: str) -> list[Reached]:
    """What was run over this bandwidth, the machines alone first, in the order of ``ROWS``."""
    found = []
    for row in ROWS:
        link = bandwidth if row.stack.talks else ""
        runs = [
            run for run in rows if not run.search and (run.row, run.bandwidth) == (row.name, link) and _is_of(run, plan)
        ]
        if runs:
            found.append(Reached(row, runs[0].lr, [rows[run] for run in sorted(runs, key=lambda run: run.seed)]))
    return found


def _is_of(run: Run, plan: Plan) -> bool:
    return (run.minutes, run.model) == (plan.search_minutes if run.search else plan.minutes, plan.model)


def write_report(results: Results, plan: Plan) -> list[Path]:
    """Draw what there is of these minutes and this model."""
    panels = {bandwidth: reached(results.rows, plan, bandwidth) for bandwidth in BANDWIDTHS}
    panels = {bandwidth: found for bandwidth, found in panels.items() if any(of.row.stack.talks for of in found)}
    if not panels:
        return []
    page, picture = results.path.with_suffix(".md"), results.path.with_suffix(".png")
    some = next(iter(panels.values()))[0].outcomes[0]
    lines = [
        "# Loss over minutes",
        "",
        f"![Loss over minutes]({picture.name})",
        "",
        textwrap.fill(_about(some, plan, sum(_is_of(run, plan) for run in results.rows)), 120, break_on_hyphens=False),
        "",
    ]
    if CLAIMS.exists():
        lines += [CLAIMS.read_text(encoding="utf-8").strip(), ""]
    for bandwidth, found in panels.items():
        lines += [*_table(bandwidth, found), ""]
    lines += _rates(panels, results.rows, plan)
    write_atomically(page, "\n".join(lines).rstrip() + "\n")
    _draw(panels, plan, picture)
    return [page, picture]


def _about(some: Outcome, plan: Plan, count: int) -> str:
    """Return how the rows were made, and what they mean."""
    last_average = ", ".join(f"{4 * some.parameters * 8 / bits:.1f} s at {name}" for name, bits in BANDWIDTHS.items())
    return (
        f"Made by `python -m benchmarks.minutes --minutes {plan.minutes:g}` on {some.machine} with {some.versions}; "
        f"{count} runs, those that find learning rates included. A Llama of {some.parameters / 1e6:.2f} million "
        f"parameters ({plan.model}) on the sources of Python's standard library, {BATCH * SEQ_LENGTH} tokens a step "
        f"at each of {NUM_ENDS} ends, one core each, with AdamW unless said; every row for {plan.minutes:g} minutes. "
        "The ends are network namespaces joined by a veth pair whose bandwidth `tc tbf` limits in both directions. "
        f"Learning rates go up over {100 * WARMUP:g} % of the time and down over the last {100 * DECAY:g} %; each row "
        f"has its own, the best in trainings of {plan.search_minutes:g} minutes by factors of two that has worse ones "
        "at both sides, found on other held-out text than is reported. Loss is that of the mean weights of both ends "
        f"on {HELD_OUT} held-out sequences, in nats per token, scored after the training; where the ends differ, the "
        f"one average in fp32 that makes this model is not in the time ({last_average}). One machine alone trains at "
        "both ends at once, each for itself, on all of the text; its loss is the mean of the two. MB: received by an "
        "end on the interface, headers included, 10^6 bytes. r: time that a step's bytes take on the wire, over the "
        "time of a step of one machine alone. n: steps between two sync points; d: delay."
    )


def _table(bandwidth: str, found: Sequence[Reached]) -> list[str]:
    alone = next((of for of in found if of.row.name == ALONE), None)
    lines = [f"## {bandwidth}", ""]
    if alone is not None:
        wire_s = 4 * alone.outcomes[0].parameters * 8 / BANDWIDTHS[bandwidth]
        lines += [
            f"An all-reduce of fp32 gradients: r = {wire_s / alone.mean('step_s'):.2g} ({wire_s:.2f} s on the wire, "
            f"{alone.mean('step_s'):.3f} s of computing).",
            "",
        ]
    lines += [
        "| | learning rate | loss at the end | minutes to the loss of one machine alone | times as fast | tokens/s | "
        "MB per step | r |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_line(of, alone, bandwidth) for of in found]


def _line(of: Reached, alone: Reached | None, bandwidth: str) -> str:
    minutes = times = wire = ""
    if alone is not None:
        end, target = alone.curve[-1]
        when = minutes_to(of.curve, target)
        minutes, times = ("never", "") if when is None else (f"{when:.1f}", f"{end / when:.2f}")
        if of.row.stack.talks:
            wire = f"{of.mean('bytes_per_step') * 8 / BANDWIDTHS[bandwidth] / alone.mean('step_s'):.2g}"
    cells = [
        of.row.name,
        f"{of.lr:g}",
        Stat.of([outcome.loss for outcome in of.outcomes], ".3f"),
        minutes,
        times,
        f"{of.mean('tokens_per_s'):,.0f}",
        f"{of.mean('bytes_per_step') / 1e6:.3f}",
        wire,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _rates(panels: Mapping[str, Sequence[Reached]], rows: Mapping[Run, Outcome], plan: Plan) -> list[str]:
    lines = ["## All rates that were tried", "", "| | | validation loss by learning rate |", "| --- | --- | --- |"]
    for name in dict.fromkeys(of.row.name for found in panels.values() for of in found):
        for bandwidth in BY_NAME[name].bandwidths:
            known = tried(name, bandwidth, rows, plan)
            if known:
                text = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in known.items())
                lines.append(f"| {name} | {bandwidth} | {text} |")
    return lines


def _draw(panels: Mapping[str, Sequence[Reached]], plan: Plan, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 6.4), sharey=True, squeeze=False, layout="constrained"
    )
    styles = _styles()
    for panel, (bandwidth, found) in zip(axes.flat, panels.items(), strict=True):
        for of in found:
            panel.plot(*zip(*of.curve, strict=True), label=of.row.name, **styles[of.row.name])
        panel.set(title=bandwidth, xlabel="minutes", xlim=(0, plan.minutes))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    curves = [of.curve for found in panels.values() for of in found]
    # All begin at the same loss and differ by little in the end; the first fifth of the time would hide that.
    early = [loss for curve in curves for minutes, loss in curve if minutes >= 0.2 * plan.minutes]
    lowest, highest = min(early), max(early)
    axes.flat[0].set_ylim(lowest - 0.03 * (highest - lowest), highest)
    axes.flat[0].set_ylabel("held-out loss, nats per token")
    named = {}
    for panel in axes.flat:
        handles, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)


def _styles() -> dict[str, dict[str, Any]]:
    """A colour for each stack, a line for each of its rows; squares for Muon."""
    styles: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = {}
    for row in ROWS:
        stack = "torch" if row.name.startswith(ALONE) else row.stack.stack
        marker = "s" if row.inner == "Muon" else None
        number = count[stack] = count.get(stack, -1) + 1
        styles[row.name] = {
            "color": _COLOURS[stack],
            "linestyle": _LINES[number % len(_LINES)],
            "marker": marker,
            "markersize": 3,
        }
    return styles
