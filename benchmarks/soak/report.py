"""The two tables of the soak."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import median

from benchmarks.soak.disturb import Outcome, Report
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.run import HEARTBEAT_S, INTERVAL, SAVE_EVERY
from benchmarks.table import machine, versions

Calm = list[dict[str, float]]


def random_faults(arguments: argparse.Namespace, report: Report, calm: Calm) -> list[str]:
    faults, end = report.faults, report.ends
    lines = [
        "# Random faults in an elastic swarm",
        "",
        *_made_with("", arguments),
        "",
        f"{_swarm(arguments)}; {report.seconds / 60:.0f} minutes.",
        "",
        "| | |",
        "| --- | --- |",
        f"| the launcher's exit code | {report.code} |",
        f"| particles that came to the end | {len(end)} of {arguments.particles} |",
        f"| faults | {len(faults)}, which is {len(faults) / report.seconds * 3600:.0f} per hour |",
        f"| starts of a particle | {report.starts}, the first {arguments.particles} included |",
        f"| held-out loss of the particles | {_list(end, 'loss')} |",
        f"| undisturbed, {len(calm)} seeds | {_list(calm, 'loss')} |",
        f"| held-out accuracy | {_list(end, 'accuracy')} |",
        f"| undisturbed | {_list(calm, 'accuracy')} |",
        f"| processes left behind | {len(report.processes)} |",
        f"| unfinished checkpoints left behind | {len(report.files)} |",
        f"| memory of a particle, first and last third | {_megabytes(report.memory)} |",
        f"| memory of the launcher, first and last | {_megabytes(report.supervisor)} |",
        "",
        "| fault | times | sync points without it or them, median | steps trained again, most "
        "| seconds until all synced again, alive: median (worst) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what in FAULTS:
        found = [outcome for fault, outcome in faults if fault.what == what]
        if found:
            lines.append(f"| {what} | {len(found)} | {_outcomes(found)} |")
    note = "The next fault often comes before the last one is mended, so a row includes what the next faults did; "
    note += "and the launcher waits longer with each restart of a particle, up to a minute."
    return [*lines, "", note, ""]


def each_fault(arguments: argparse.Namespace, reports: dict[str, Report], calm: Calm) -> list[str]:
    same, losses = calm[0]["loss"], [run["loss"] for run in calm]  # the particles of all runs begin as those of calm[0]
    lines = [
        "# One kind of fault at a time",
        "",
        *_made_with("each ", arguments),
        "",
        f"{_swarm(arguments)}. Undisturbed, {len(calm)} seeds: held-out loss {_list(calm, 'loss')}; so chance alone is "
        f"worth {max(losses) - min(losses):.4f}. The others have the first of these seeds.",
        "",
        "| fault | times | sync points without it or them, median | steps trained again, most "
        "| seconds until all synced again, alive: median (worst) | at the end | held-out loss | to its undisturbed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for what, report in reports.items():
        loss = median(end["loss"] for end in report.ends)
        lines.append(
            f"| {what} | {len(report.faults)} | {_outcomes([outcome for _, outcome in report.faults])} "
            f"| {len(report.ends)} of {arguments.particles} | {loss:.4f} | {loss - same:+.4f} |"
        )
    left = sum(len(report.processes) + len(report.files) for report in reports.values())
    return [*lines, "", f"Processes and unfinished checkpoints left behind, in all runs: {left}.", ""]


def _made_with(mode: str, arguments: argparse.Namespace) -> list[str]:
    options = ["steps", "pace", "every", "particles", "undisturbed", "seed"]
    options += ["times"] if mode else []
    said = " ".join(f"--{name} {getattr(arguments, name):g}" for name in options)
    if arguments.kinds != list(FAULTS):
        said += " --kinds " + " ".join(f"'{kind}'" for kind in arguments.kinds)
    return [f"`python -m benchmarks.soak {mode}{said}`, {machine()}, {versions()}."]


def _swarm(arguments: argparse.Namespace) -> str:
    return (
        f"{arguments.particles} particles of one rank, ZeRO 2, averaging every {INTERVAL} steps, a checkpoint every "
        f"{SAVE_EVERY}, heartbeat {HEARTBEAT_S:g} s"
    )


def _outcomes(found: list[Outcome]) -> str:
    back = [o.back_s for o in found if o.back_s == o.back_s]
    times = f"{median(back):.0f} ({max(back):.0f})" if back else ""
    lost = f"{len(found) - len(back)} not" * (len(back) < len(found))
    missed = f"{median(o.missed for o in found):g} | {max(o.again for o in found)}" if found else " | "
    return f"{missed} | {', '.join(filter(None, (times, lost)))}"


def _list(runs: Iterable[dict[str, float]], key: str) -> str:
    return ", ".join(f"{run[key]:.4f}" for run in runs)


def _megabytes(values: tuple[float, float]) -> str:
    return ", ".join(f"{value / 1e6:.0f} MB" for value in values)
