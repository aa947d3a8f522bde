"""The table and the picture of what was measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.slow_link.results import Measured, SlowLinkTable
from benchmarks.slow_link.runs import BANDWIDTHS, MICRO_BATCH, SEQ_LENGTH, Run
from ds_pso.utils.atomic_io import write_atomically

CLAIMS = Path(__file__).parent / "claims.md"
GAIN = "100 Mbit/s"  # the link of the picture that the README shows, and what it shows there
GAINS = {
    "DeepSpeed ZeRO 2, every step": Run("DeepSpeed", interval=1),
    "torchft DiLoCo, every 8 steps": Run("torchft", "diloco", interval=8),
    "torchft DiLoCo, every 32 steps": Run("torchft", "diloco"),
    "torchft DiLoCo, every 32 steps, delay 8": Run("torchft", "diloco", delay=8),
    "ds_pso ZeRO 2, every 8 steps": Run("ds_pso", interval=8),
    "ds_pso ZeRO 2, every 8 steps, int4, delay 2": Run("ds_pso", interval=8, wire="int4", delay=2),
    "ds_pso ZeRO 0, every 8 steps, int4, delay 2": Run("ds_pso", interval=8, wire="int4", delay=2, stage=0),
    "ds_pso ZeRO 2, every 32 steps, int4, streaming": Run("ds_pso", wire="int4", delay=1, fragments=4),
}
_COLOURS: dict[str, Any] = {"ds_pso": "C0", "torchft": "C1", "Accelerate": "C2", "DeepSpeed": "C3", "DDP": "C4"}
_TOKENS = 2 * MICRO_BATCH * SEQ_LENGTH  # of both ends, in a step

_LOSS = (
    "Mean of both ends over the last 8 steps, and in brackets after how many. It says that a stack trains; rows of "
    "different lengths do not compare."
)

_ABOUT = (
    f"A Llama of 7.4 million parameters, AdamW in fp32, {MICRO_BATCH * SEQ_LENGTH} tokens a step at each end, P = 2, "
    "S = 1, one core for each end. The ends are network namespaces joined by a veth pair whose bandwidth `tc tbf` "
    "limits in both directions; packets are as large as TCP makes them, so that headers hardly count. "
    "Median over the runs, and from the lowest to the highest if there are several."
)
_SHARE = (
    "Compute share: tokens/s over the tokens/s of the same stack, in the same repetition, with nothing to say to the "
    "other end, the median of one run among those over each link; for "
    "DeepSpeed that is a world of one, which updates all of the optimizer's state and not a half. "
    "n: steps between two sync points, with a schedule at first; d: `delay`, for torchft its fragment_sync_delay; "
    "streaming: `swarm.streaming` with so many fragments."
)


def _share(table: SlowLinkTable, run: Run, row: Measured) -> float:
    """Against the same stack alone, the median of the same repetition."""
    alone = [
        r.step_s for a, r in table.rows.items() if not a.talks and replace(a, bandwidth=run.bandwidth) == run.alone
    ]
    return median(alone) / row.step_s if alone else float("nan")


_SECTIONS: list[tuple[str, Callable[[SlowLinkTable, Run, Measured], float], str]] = [
    ("Compute share, %", lambda table, run, row: 100 * _share(table, run, row), ".1f"),
    ("Tokens per second, both ends", lambda table, run, row: _TOKENS / row.step_s, ".0f"),
    ("Seconds of a step, sync points included", lambda table, run, row: row.step_s, ".3f"),
    (
        "Received in n steps on the interface, MB (10^6 bytes)",
        lambda table, run, row: row.bytes_per_step * (row.steps_per_sync or run.interval) / 1e6,
        ".2f",
    ),
    ("Steps between two sync points", lambda table, run, row: row.steps_per_sync or run.interval, ".1f"),
]


def write_report(table: SlowLinkTable) -> list[Path]:
    """Draw what there is."""
    page, picture = table.path.with_suffix(".md"), table.path.with_suffix(".png")
    machines = " and ".join(sorted({row.machine for row in table.rows.values()}))
    versions = " and ".join(sorted({row.versions for row in table.rows.values()}))
    repetitions = len({run.number for run in table.rows})
    lines = [
        f"# {table.path.stem}",
        "",
        f"![The same as a picture]({picture.name})",
        "",
        f"Made by `python -m benchmarks.slow_link` on {machines} with {versions}; {len(table.rows)} runs, in "
        f"{repetitions} repetition{'s' if repetitions > 1 else ''}.",
        "",
        _ABOUT,
        "",
        _SHARE,
        "",
    ]
    for title, value, spec in _SECTIONS:
        lines += [f"## {title}", "", *_grid(table, partial(value, table), spec), ""]
    lines += _losses(table)
    alone = [run for run in table.rows if not run.talks]
    lines += ["## Alone", "", "| | seconds of a step |", "| --- | --- |"]
    for name in sorted({run.name for run in alone}):
        lines.append(f"| {name} | {_cell([table.rows[run].step_s for run in alone if run.name == name], '.3f')} |")
    if CLAIMS.exists():
        lines += ["", *CLAIMS.read_text(encoding="utf-8").splitlines()]
    write_atomically(page, "\n".join(lines).rstrip() + "\n")
    _draw(table, picture)
    _draw_gain(table, table.path.with_name("gain.png"))
    return [page, picture]


def _losses(table: SlowLinkTable) -> list[str]:
    """The section of the losses; nothing if no row has one."""
    known = {run: row for run, row in table.rows.items() if run.talks and row.steps}
    if not known:
        return []
    lines = ["## Training loss, nats per token", "", _LOSS, ""]
    lines += [f"| | {' | '.join(BANDWIDTHS)} |", f"| --- |{' --- |' * len(BANDWIDTHS)}"]
    for name in dict.fromkeys(run.name for run in known):
        cells = []
        for bandwidth in BANDWIDTHS:
            rows = [row for run, row in known.items() if (run.name, run.bandwidth) == (name, bandwidth)]
            cells.append(f"{median(row.loss for row in rows):.3f} ({rows[0].steps})" if rows else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def shares(table: SlowLinkTable, name: str, bandwidth: str) -> list[float]:
    """Compute share in percent, one for each repetition."""
    found = [
        100 * _share(table, run, row)
        for run, row in table.rows.items()
        if (run.name, run.bandwidth) == (name, bandwidth)
    ]
    return [share for share in found if not math.isnan(share)]


def tokens_per_s(table: SlowLinkTable, name: str, bandwidth: str) -> list[float]:
    """Of both ends, one for each repetition."""
    return [_TOKENS / row.step_s for run, row in table.rows.items() if (run.name, run.bandwidth) == (name, bandwidth)]


def _grid(table: SlowLinkTable, value: Callable[[Run, Measured], float], spec: str) -> list[str]:
    talking = {run: row for run, row in table.rows.items() if run.talks}
    lines = [f"| | {' | '.join(BANDWIDTHS)} |", f"| --- |{' --- |' * len(BANDWIDTHS)}"]
    for name in dict.fromkeys(run.name for run in sorted(talking, key=lambda run: -run.interval)):
        cells = [
            _cell([value(r, row) for r, row in talking.items() if (r.name, r.bandwidth) == (name, bandwidth)], spec)
            for bandwidth in BANDWIDTHS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float], spec: str) -> str:
    if not values:
        return ""
    span = f" ({min(values):{spec}} to {max(values):{spec}})" if len(values) > 1 else ""
    return f"{median(values):{spec}}{span}"


def _draw(table: SlowLinkTable, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    talking = {run: row for run, row in table.rows.items() if run.talks and not math.isnan(_share(table, run, row))}
    names = list(dict.fromkeys(run.name for run in sorted(talking, key=lambda run: -run.interval)))
    shown = [bandwidth for bandwidth in BANDWIDTHS if any(run.bandwidth == bandwidth for run in talking)]
    if not shown:
        return
    figure, panels = plt.subplots(
        1, len(shown), figsize=(3.2 + 2.6 * len(shown), 0.9 + 0.26 * len(names)), sharey=True, squeeze=False
    )
    for panel, bandwidth in zip(panels.flat, shown, strict=True):
        for y, name in enumerate(names):
            found = shares(table, name, bandwidth)
            if found:
                middle = median(found)
                panel.barh(y, middle, color=_COLOURS[name.split()[0]], height=0.7)
                panel.plot([min(found), max(found)], [y, y], color="0.2", lw=1)
                panel.text(max(found) + 1.5, y, f"{middle:.0f}", va="center", fontsize=7)
        panel.set(title=bandwidth, xlim=(0, 120), xlabel="compute share, %", yticks=range(len(names)))
        panel.axvline(95, color="0.6", lw=0.8, ls=":")
        panel.set_yticklabels(names, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].invert_yaxis()
    _save(figure, picture)


def _draw_gain(table: SlowLinkTable, picture: Path) -> None:
    """What the README shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {label: tokens_per_s(table, run.name, GAIN) for label, run in GAINS.items()}
    if not all(found.values()):
        return
    figure, panel = plt.subplots(figsize=(7.6, 3.1))
    longest = max(max(values) for values in found.values())
    for y, (label, values) in enumerate(found.items()):
        panel.barh(y, median(values), color=_COLOURS[label.split()[0].strip(",")], height=0.72)
        panel.plot([min(values), max(values)], [y, y], color="0.2", lw=1)
        panel.text(max(values) + 0.015 * longest, y, f"{median(values):,.0f}", va="center", fontsize=9)
    panel.set(xlim=(0, 1.12 * longest), xlabel=f"tokens/s over {GAIN}, both ends")
    panel.set_yticks(range(len(found)), list(found), fontsize=9)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    _save(figure, picture)


def _save(figure: Any, picture: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, picture)
