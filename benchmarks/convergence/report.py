"""Writes a table as Markdown and as a picture."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.convergence.cells import COMMON, FAIRNESS, LR_FACTORS, RATE_SITUATIONS, RULES, SITUATIONS
from benchmarks.convergence.grids import Grid, Rows, Stat, equal_steps_of, grids_of, main_measure
from benchmarks.convergence.tasks import TASKS
from ds_pso.utils.atomic_io import write_atomically

CLAIMS = Path(__file__).parent / "claims"
_TUNED = (
    "Learning rates were chosen among five, a factor of two apart, for each task and rule, by the validation data, "
    "with P = 4 and seeds that are not among the table's (MNIST: three, the others: one); rates for n = 8 and n = 128 "
    "are those of n = 32."
)
_MEASURED = (
    "The model that is measured is the consensus, what `swarm.export` would write; for `none`, whose particles never "
    "sync, the mean of the particles' own numbers. `single` is one worker that sees all the samples in steps of one "
    "particle's batch; `allreduce` takes the samples of all particles in each step."
)
_PROBE = "`line_search` and, when losses are unequal, `swarm` score weights on a probe batch; that work is not counted."
_NOTES = {
    "papers": [
        _MEASURED,
        _TUNED,
        "P = 8 uses the rates of P = 4. Samples are equal: with P = 8 each particle makes half as many steps. Bytes of "
        "`allreduce` are computed: a ring all-reduce of fp32 gradients at every step; all others are counted.",
        _PROBE,
    ],
    "transformers": [_MEASURED, _TUNED, _PROBE],
    "unequal": [
        "All rules sync every 32 steps, but `allreduce` at every step. The particle in trouble is the same throughout.",
        "\n".join(f"- `{name}`: {meaning}" for name, meaning in SITUATIONS.items()),
        "Learning rates were chosen with all particles well, among five, a factor of two apart, for each task and rule "
        "by the validation data and with seeds that are not among the table's (MNIST: three, the Llama: one). In the "
        f"situations that are about rates ({', '.join(RATE_SITUATIONS)}) all rules start from the same one, that of "
        f"`{COMMON}`.",
        _PROBE,
    ],
    "fairness": [
        f"All rows of a grid have one base rate, the tuned one of `{COMMON}` times the number in the title. All sync "
        "every 32 steps with P = 4, and leave out a particle whose loss is far above the others', as is the default, "
        "but for those of `no quarantine`. `guard only` is `swarm` without learning rates of its own, `rates only` "
        "without a guard.",
        "\n".join(f"- `{name}`: {SITUATIONS[name]}" for name in FAIRNESS),
        _PROBE,
    ],
    "slow_network": [
        "`local_sgd` with P = 4: differences in few digits (`wire`), and sync points that are applied d steps later "
        "(`delay`), whole or in fragments (`in 4`: of which the first comes after d / 4 steps), or one fragment at a "
        "time (`streaming 4`: one of them syncs every n / 4 steps); intervals that begin with n and follow the drift "
        "between the particles (`drift`); and 32 steps with a sync point after each to begin with (`warm-up`). All "
        "rows have the learning rate of fp32 at n = 32. With n = 16, 8 and 4, bf16, int8 and int4 move about the bytes "
        "of fp32 at n = 32.",
    ],
    "optimizer_state": [
        "What becomes of the optimizer's moments at a sync point: each particle keeps its own, all take their mean, or "
        "they become zero. n = 32, P = 4; the learning rates were tuned with `keep`.",
    ],
}
_COLORS = dict(zip(RULES, ["0.1", *(f"C{i}" for i in (0, 1, 2, 3, 4, 5, 8)), "0.45", "0.7"], strict=True))
_MARKERS = dict(zip(RULES, "so^v<>DPxX", strict=True))


def write_report(table: str, csv: Path, rows: Rows, num_cells: int, real: Rows) -> list[Path]:
    """Write ``<csv's name>.md`` and ``.png`` beside the CSV; returns both paths.

    Args:
        num_cells: of the whole table.
        real: the same or other cells, run by a process per rank, to compare with.
    """
    grids = list(grids_of(table, rows))
    extra = list(equal_steps_of(rows)) if table == "papers" else []
    page, picture = csv.with_suffix(".md"), csv.with_suffix(".png")
    lines = [f"# {csv.stem}", "", f"![The same as a picture]({picture.name})", "", *_head(table, rows, num_cells)]
    lines += [line for note in _NOTES[table] for line in (note, "")]
    lines += _edges(rows)
    first: dict[str, Grid] = {}  # of each title
    for grid in [*grids, *extra]:
        if grid.title not in first:
            first[grid.title] = grid
            lines += [f"## {grid.title}", ""]
        lines.append(grid.markdown())
    lines += [*_confirmed(rows, real), *_claims(table, csv)]
    write_atomically(page, "\n".join(lines).rstrip() + "\n")
    draw([grid for grid in first.values() if grid not in extra], picture)
    return [page, picture]


def _head(table: str, rows: Rows, num_cells: int) -> list[str]:
    outcomes = rows.values()
    counts = sorted(set(Counter(replace(cell, seed=0) for cell in rows).values()))
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"
    options = " --real" if next(iter(outcomes)).how == "real" else ""
    options += f" --scale {scale:g}" if (scale := next(iter(rows)).scale) != 1 else ""
    lines = [
        f"Made by `python -m benchmarks.convergence {table} --tune{options}` on "
        f"{_listed(o.machine for o in outcomes)} with {_listed(o.versions for o in outcomes)}; "
        f"{_listed(o.how for o in outcomes)}; {len(rows)} runs, {sum(o.seconds for o in outcomes) / 3600:.1f} hours "
        f"of computing. Mean +- sample standard deviation over {seeds}.",
        "",
    ]
    if options.startswith(" --real"):
        lines += [f"These {len(rows)} of the table's {num_cells} runs were made to confirm the simulated ones.", ""]
    elif len(rows) < num_cells:
        lines += [f"**Not finished: {num_cells - len(rows)} of {num_cells} runs are missing.**", ""]
    return lines


def _edges(rows: Rows) -> list[str]:
    """Name the rows whose learning rate may not be the best, because none beyond it was tried."""
    found: dict[str, dict[str, None]] = {}  # an ordered set of rules for each task
    for cell in rows:
        tried = [TASKS[cell.task].lr * factor for factor in LR_FACTORS]
        if not cell.common and not min(tried) < cell.lr < max(tried):
            found.setdefault(cell.task, {})[cell.rate_key[1]] = None
    if not found:
        return []
    listed = "; ".join(f"{task}: {', '.join(f'`{rule}`' for rule in rules)}" for task, rules in found.items())
    return [
        "**The best rate is the lowest or the highest that was tried, so that a better one may lie beyond it, for**: "
        f"{listed}.",
        "",
    ]


def _confirmed(rows: Rows, real: Rows) -> list[str]:
    """Runs that were made both ways, side by side."""
    both = [cell for cell in real if cell in rows]
    if not both:
        return []
    lines = [
        "## Real runs",
        "",
        "The same runs with a process per rank, gloo and ZeRO 2, instead of a simulation at ZeRO 0. Sums are added in "
        "another order, and training multiplies such differences.",
        "",
        "| run | measure | simulated | real |",
        "| --- | --- | --- | --- |",
    ]
    for cell in both:
        measure, what, spec = main_measure(cell.task)
        values = (f"{measure(cell, outcomes[cell]):{spec}}" for outcomes in (rows, real))
        lines.append(f"| {cell} | {what} | {' | '.join(values)} |")
    return [*lines, ""]


def _claims(table: str, csv: Path) -> list[str]:
    """What people concluded from the full table of this name."""
    text = CLAIMS / f"{table}.md"
    return text.read_text(encoding="utf-8").splitlines() if csv.stem == table and text.exists() else []


def _listed(values: Any) -> str:
    return " and ".join(sorted(set(values)))


# -- the picture --------------------------------------------------------------------------------


def draw(grids: Sequence[Grid], image: Path) -> None:
    """A panel for each grid: conditions from top to bottom, in each one dot per row; further left is better.

    The dots stand beside their names where there are too many rows for a legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_columns = min(2, len(grids))
    num_rows = math.ceil(len(grids) / num_columns)
    named = max(len(grid.rows) for grid in grids) > len(RULES)
    dots = max(len(grid.stats) + len(grid.columns) for grid in grids)
    figure, panels = plt.subplots(
        num_rows,
        num_columns,
        figsize=(6 * num_columns, num_rows * (1.2 + (0.2 if named else 0.14) * dots) + 0.8),
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat[len(grids) :]:
        panel.set_axis_off()
    for panel, grid in zip(panels.flat, grids, strict=False):
        _draw_panel(panel, grid, named=named)
    labels: dict[str, Any] = {}
    for panel in panels.flat:
        labels.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    rows = list(dict.fromkeys(row for grid in grids for row in grid.rows if row in labels))
    rows.sort(key=lambda row: RULES.index(row) if row in RULES else len(RULES))
    if not named:
        figure.legend(
            [labels[row] for row in rows],
            rows,
            loc="outside lower center",
            ncols=3 if num_columns == 1 else 5,
            frameon=False,
        )
    temporary = image.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, image)


def _draw_panel(panel: Any, grid: Grid, *, named: bool) -> None:
    as_error = "accuracy" in grid.what
    points = {key: _point(stat, as_error) for key, stat in grid.stats.items()}
    from matplotlib.ticker import LogFormatter

    known = [x for x, _ in points.values() if math.isfinite(x)]
    if known and min(known) > 0 and max(known) > 4 * min(known):
        panel.set_xscale("log")
        for axis_formatter in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            axis_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    ticks, names, y = [], [], 0.0
    for band, column in enumerate(grid.columns):
        rules = [rule for rule in grid.rows if (rule, column) in points]
        if band % 2 == 0:
            panel.axhspan(y - 1, y + len(rules), color="0.96", zorder=0)
        for offset, rule in enumerate(rules):
            x, deviation = points[rule, column]
            style = _style(rule, grid.rows)
            if math.isfinite(x):
                panel.errorbar(x, y + offset, xerr=deviation, label=rule, ms=5, capsize=2, lw=1.2, ls="none", **style)
            else:
                panel.text(
                    0.99,
                    y + offset,
                    f"{rule}: {grid.stats[rule, column]}",
                    transform=panel.get_yaxis_transform(),
                    color=style["color"],
                    ha="right",
                    va="center",
                    fontsize=7,
                )
        ticks += [y + i for i in range(len(rules))] if named else [y + (len(rules) - 1) / 2]
        names += [f"{rule},  {column}" for rule in rules] if named else [column]
        y += len(rules) + 1
    panel.set(yticks=ticks, yticklabels=names, ylim=(y - 1, -1), title=grid.title)
    panel.set_xlabel("test error, %" if as_error else grid.what)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", which="both", color="0.88", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _style(row: str, rows: Sequence[str]) -> dict[str, Any]:
    """The same for a rule in all pictures."""
    if row in _COLORS:
        return {"color": _COLORS[row], "marker": _MARKERS[row]}
    return {"color": f"C{rows.index(row) % 10}", "marker": "so^v<>DPX"[rows.index(row) % 9]}


def _point(stat: Stat, as_error: bool) -> tuple[float, float]:
    """Position and error bar."""
    return (100 - stat.mean if as_error else stat.mean), (0.0 if math.isnan(stat.deviation) else stat.deviation)
