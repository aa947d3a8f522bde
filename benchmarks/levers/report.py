"""The page and the figure of what was run."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence.grids import Stat
from benchmarks.levers.results import Outcome, Results, Run
from benchmarks.levers.search import best_rate, tried
from benchmarks.levers.settings import PARTICLES, SEEDS, SETTINGS, SIZES, Setting
from ds_pso.utils.atomic_io import write_atomically

CLAIMS = Path(__file__).parent / "claims.md"
EVERY_STEP = "every step"


def of(setting: Setting, rows: Mapping[Run, Outcome]) -> list[Outcome]:
    """Return the runs of a setting at its best rate, in the order of seeds."""
    lr = best_rate(setting, rows)
    return [rows[Run(str(setting), lr, seed)] for seed in SEEDS if lr and Run(str(setting), lr, seed) in rows]


def write_report(size: str, results: Results) -> list[Path]:
    """Draw what there is."""
    rows = results.rows
    known = [setting for setting in SETTINGS if of(setting, rows)]
    if not known:
        return []
    page, picture = results.path.with_suffix(".md"), results.path.with_suffix(".png")
    lines = [
        f"# Levers: {size}",
        "",
        f"![Loss over bytes]({picture.name})",
        "",
        textwrap.fill(_about(size, rows), 120, break_on_hyphens=False),
        "",
        CLAIMS.read_text(encoding="utf-8").strip(),
        "",
        "| setting | learning rate | loss | seeds | MB | bytes against every step | gap |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(setting, rows) for setting in known),
        "",
        "## All rates that were tried",
        "",
        "| setting | validation loss by learning rate, seed 1 |",
        "| --- | --- |",
        *(f"| {setting} | {_rates(setting, rows)} |" for setting in SETTINGS if tried(setting, rows)),
        "",
    ]
    write_atomically(page, "\n".join(lines))
    _draw(known, rows, picture)
    return [page, picture]


def _about(size: str, rows: Mapping[Run, Outcome]) -> str:
    """Return how the rows were made, and what they mean."""
    some, about = next(iter(rows.values())), SIZES[size]
    return (
        f"Made by `python -m benchmarks.levers {size}` on {some.machine} with {some.versions}; {len(rows)} runs. A "
        f"Llama of {some.parameters / 1e6:.2f} million parameters ({about.model}), {about.steps} steps of "
        f"{PARTICLES} x {about.batch} sequences, P = {PARTICLES} simulated particles. Learning rates go up over 5 % "
        "of the steps and down over the last 20 %; each setting has its own, the best of a grid by factors of two that "
        "has worse ones at both sides, found on other held-out text than is reported. Loss is that of the mean "
        "particle, in nats per token: mean +- standard deviation over the seeds. MB: what each particle receives in "
        "the whole training. Gap: to the same inner optimizer with an all-reduce of gradients at every step."
    )


def _row(setting: Setting, rows: Mapping[Run, Outcome]) -> str:
    found = of(setting, rows)
    base = next((of(s, rows) for s in SETTINGS if s.inner == setting.inner and s.name == EVERY_STEP), [])
    loss = Stat.of([outcome.loss for outcome in found], ".3f")
    megabytes = found[0].megabytes
    every_step = _every_step_megabytes(found[0], rows)
    ratio = every_step / megabytes if megabytes else 0.0
    pairs = [(a.loss, b.loss) for a, b in zip(found, base, strict=False)]
    gap = ""
    if pairs and setting.name != EVERY_STEP:
        mean = statistics.fmean(a - b for a, b in pairs)
        gap = f"{mean:+.3f} ({100 * mean / statistics.fmean(b for _, b in pairs):+.1f} %)"
    bytes_text = "1" if ratio == 1 else f"1/{ratio:.3g}"
    cells = [setting, f"{best_rate(setting, rows):g}", loss, len(found), f"{megabytes:.3g}", bytes_text, gap]
    return f"| {' | '.join(map(str, cells))} |"


def _every_step_megabytes(outcome: Outcome, rows: Mapping[Run, Outcome]) -> float:
    known = [rows[run].megabytes for run in rows if run.setting.endswith(EVERY_STEP)]
    return known[0] if known else outcome.megabytes


def _rates(setting: Setting, rows: Mapping[Run, Outcome]) -> str:
    return ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in tried(setting, rows).items())


def _draw(known: list[Setting], rows: Mapping[Run, Outcome], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    styles: dict[str, Any] = {"AdamW": {"color": "C0", "marker": "o"}, "Muon": {"color": "C1", "marker": "s"}}
    for setting in known:
        found = of(setting, rows)
        losses = [outcome.loss for outcome in found]
        mean = statistics.fmean(losses)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        axes.errorbar(found[0].megabytes, mean, yerr=spread, capsize=3, **styles[setting.inner])
        axes.annotate(setting.name, (found[0].megabytes, mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    for inner, style in styles.items():
        axes.plot([], [], linestyle="none", label=inner, **style)
    axes.set_xscale("log")
    axes.margins(x=0.12)  # room for the name at the right
    axes.set_xlabel("MB that each particle receives in the whole training")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)
