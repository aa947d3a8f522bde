"""The page and the figure of what was run."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path

from benchmarks.convergence.grids import Grid, Stat, parse_curve
from benchmarks.experts.results import Outcome, Results, Run
from benchmarks.experts.settings import GREEDY, ROWS, SEEDS, SIZES, TARGETS
from ds_pso.utils.atomic_io import write_atomically

CLAIMS = Path(__file__).parent / "claims.md"
Rows = Mapping[Run, Outcome]


def write_report(size: str, results: Results) -> list[Path]:
    """Draw what there is."""
    rows = results.rows
    if not rows:
        return []
    page, picture = results.path.with_suffix(".md"), results.path.with_suffix(".png")
    targets = [target for target in TARGETS if any(run.target == target for run in rows)]
    lines = [
        f"# Experts: {size}",
        "",
        f"![Best loss over evaluations]({picture.name})",
        "",
        textwrap.fill(_about(size, rows), 120, break_on_hyphens=False),
        "",
        CLAIMS.read_text(encoding="utf-8").strip(),
        "",
        _grid(rows, targets, paired=False).markdown(),
        _grid(rows, targets, paired=True).markdown(),
    ]
    write_atomically(page, "\n".join(lines))
    _draw(rows, targets, picture)
    return [page, picture]


def _about(size: str, rows: Rows) -> str:
    some, about = next(iter(rows.values())), SIZES[size]
    return (
        f"Made by `python -m benchmarks.experts {size}` on {some.machine} with {some.versions}; {len(rows)} searches. "
        f"A base ({about.model}), trained on all domains for {about.base_steps} steps of {about.batch} sequences, and "
        f"an expert for each domain, trained from it for {about.expert_steps} more; one more expert has learnt random "
        f"labels. A target is held-out text of some domains in equal shares: {about.search} sequences by which was "
        f"searched, {about.test} from other documents for the loss in the table, in nats per token; mean +- standard "
        f"deviation over seeds, which differ in base, experts, samples and search. At most {about.evaluations} "
        "evaluations each."
    )


def _grid(rows: Rows, targets: list[str], *, paired: bool) -> Grid:
    stats = {}
    for row in ROWS:
        for target in targets:
            seeds = [s for s in SEEDS if Run(target, row.name, s) in rows]
            if paired:
                seeds = [s for s in seeds if row.name != GREEDY and Run(target, GREEDY, s) in rows]
            values = [rows[Run(target, row.name, s)].test_loss for s in seeds]
            if paired:
                values = [
                    value - rows[Run(target, GREEDY, s)].test_loss for value, s in zip(values, seeds, strict=True)
                ]
            if values:
                stats[row.name, target] = Stat.of(values, "+.3f" if paired else ".3f")
    title = (
        f"Test loss minus that of the {GREEDY}, by pairs of equal seed; bold: beyond noise" if paired else "Test loss"
    )
    names = [row.name for row in ROWS if any((row.name, target) in stats for target in targets)]
    return Grid("", title, names, targets, stats, paired)


def _draw(rows: Rows, targets: list[str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(targets), figsize=(4.5 * len(targets), 4.5), layout="constrained", squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        for number, row in enumerate(ROWS):
            found = [rows[Run(target, row.name, s)] for s in SEEDS if Run(target, row.name, s) in rows]
            found = [outcome for outcome in found if outcome.curve]
            if found:
                last = max(outcome.evaluations for outcome in found)
                means = [statistics.fmean(_at(outcome, n) for outcome in found) for n in range(1, last + 1)]
                style = {"color": f"C{number % 10}", "linestyle": "--" if number >= 10 else "-"}
                axis.plot(range(1, last + 1), means, label=row.name, **style)
        axis.set_title(target)
        axis.set_xlabel("evaluations")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("best loss by which was searched, nats per token")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), fontsize=7, loc="outside right upper")
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)


def _at(outcome: Outcome, evaluation: int) -> float:
    """Return the best loss after so many evaluations."""
    return [loss for number, loss in parse_curve(outcome.curve) if number <= max(evaluation, 1)][-1]
