"""The page of a report: the sentences above the figures, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ds_pso._version import __version__
from ds_pso.errors import ConfigError
from ds_pso.report.drawing import DARK, LIGHT, color_of, save_png, to_svg
from ds_pso.report.figures import pictures
from ds_pso.report.runs import Run
from ds_pso.report.thinning import Totals
from ds_pso.utils.atomic_io import write_atomically

UNKNOWN = "-"
COLUMNS = {
    "final loss": "mean training loss of the particles at the last sync point or evaluation",
    "held-out": "held-out loss of the particles at the last evaluation, their mean",
    "exported": "held-out loss of the exported model",
    "steps": "optimizer steps taken",
    "time": "from the first record to the last one",
    "sync points": "that are finished",
    "MB received": "by one rank, the leader, at sync points",
    "stood still": "share of the time in which training stood still at sync points",
}
LOSSES = 3  # columns of which the lowest number is marked


def write(runs: Sequence[Run], output: Path, images: bool) -> Path:
    """Write the page and its pictures; see ``write_report``."""
    page, folder = output / "report.html", output / "report"
    try:
        (folder if images else output).mkdir(parents=True, exist_ok=True)
        figures = []
        for picture in pictures(runs):
            svg = to_svg(picture.figure, picture.name, picture.title)
            figures.append({"title": picture.title, "caption": picture.caption, "svg": Markup(svg)})
            if images:
                save_png(picture.figure, folder / f"{picture.name}.png", picture.title)
        write_atomically(page, render(runs, figures))
    except OSError as error:
        raise ConfigError(f"{output}: cannot write the report ({error.strerror}); name another --output") from error
    return page


def render(runs: Sequence[Run], figures: Sequence[Mapping[str, object]]) -> str:
    """Return the HTML; everything but the figures is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = {value: name for name, value in LIGHT.items()}
    return environment.get_template("page.html.j2").render(
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        heading=_capital(runs[0].description) if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[
            {"run": run, "color": names[color_of(run.number)], "state": state(run), "facts": facts(run)} for run in runs
        ],
        columns=COLUMNS,
        rows=table(runs),
        settings=settings(runs),
        figures=figures,
        light=LIGHT,
        dark=DARK,
        version=__version__,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def state(run: Run) -> str:
    """Say how far a run has come."""
    if run.is_finished:
        return f"finished after {run.steps} steps"
    of = f" of {run.total_steps}" if run.total_steps else ""
    return f"step {run.steps}{of}, as of {run.written}"


def facts(run: Run) -> list[str]:
    """Say what else is to be known of a run, in sentences."""
    found = [_how(run)] if run.start else []
    if run.is_simulated:
        found.append("Simulated in one process: bytes are those of a real run, times mean nothing and are not shown.")
    if run.resumed_at:
        found.append(f"Resumed at step {_list(run.resumed_at)}.")
    if not run.syncs:
        why = "no sync point yet" if run.has_sync_points else "one particle: plain DeepSpeed, without sync points"
        found.append(f"{_capital(why)}.")
    found += [*_weights(run), *_guard(run.totals), *_left_out(run.totals)]
    return found


def _how(run: Run) -> str:
    assert run.start is not None
    start, parts = run.start.record, []
    if run.num_particles > 1:
        delay = start.swarm.get("delay")
        later = f"applied {delay} steps later" if delay else "training waits at sync points"
        parts += [f"weights travel as {start.swarm.get('wire')}", later]
    if start.zero_stage is not None:
        parts.append(f"ZeRO {start.zero_stage}")
    if start.parameters is not None:
        parts.append(f"{start.parameters / 1e6:.3g} million trained parameters")
    if run.arguments:
        parts.append(f"{run.arguments.get('model')} on {run.arguments.get('dataset')}")
    return _capital("; ".join(parts) + ".") if parts else ""


def _weights(run: Run) -> list[str]:
    if run.num_particles > 1 and run.totals.weights_are_alike:
        return ["At every sync point all particles had the same weight in the consensus."]
    return []


def _guard(totals: Totals) -> list[str]:
    if not totals.guards:
        return []
    won, all_of_them = totals.guards["weighted"], totals.guards.total()
    return [f"The guard preferred the weighted mean at {won} of {all_of_them} sync points where it had a choice."]


def _left_out(totals: Totals) -> list[str]:
    return [
        f"Particle {particle} was left out of {times} sync point{'s' if times > 1 else ''}{_why(totals, particle)}."
        for particle, times in sorted(totals.left_out.items())
    ]


def _why(totals: Totals, particle: int) -> str:
    """Say why it was left out the last time; nothing where the record does not."""
    reason = totals.reasons.get(str(particle))
    return f"; last because {reason}" if reason else ""


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def table(runs: Sequence[Run]) -> list[list[dict[str, object]]]:
    """Return a row for each run: of each column in COLUMNS the text, and whether it is the lowest of the losses."""
    losses = [(run.final_loss, run.final_held_out, run.exported_loss) for run in runs]
    lowest = [min(filter(math.isfinite, column), default=None) for column in zip(*losses, strict=True)]
    rows: list[list[dict[str, object]]] = []
    for run, own in zip(runs, losses, strict=True):
        texts = [
            *(_number(value, ".3f") for value in own),
            str(run.steps),
            UNKNOWN if run.is_simulated else duration(run.seconds),
            str(run.num_syncs),
            _number(run.bytes_received / 1e6, ",.1f"),
            UNKNOWN if run.is_simulated else _number(100 * run.stood_still, ".1f", " %"),
        ]
        marks = [len(runs) > 1 and value == low for value, low in zip(own, lowest, strict=True)]
        marks += [False] * (len(texts) - LOSSES)
        rows.append([{"text": text, "lowest": mark} for text, mark in zip(texts, marks, strict=True)])
    return rows


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else UNKNOWN


def duration(seconds: float) -> str:
    """Format a time: ``12.3 s``, ``4.5 min`` or ``6.7 h``."""
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
    return f"{seconds / size:.1f} {unit}"


def settings(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Return a row for each setting: its name, its value in each run, and whether these differ."""
    columns = [_settings_of(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, UNKNOWN) for column in columns]) for name in names]
    return [{"name": name, "values": values, "differ": len(set(values)) > 1} for name, values in rows]


def _settings_of(run: Run) -> dict[str, str]:
    found: dict[str, object] = {"metrics": run.path}
    found |= {f"--{name}": value for name, value in run.arguments.items()}
    if run.start:
        start = run.start.record
        found |= {"particles": start.particles, "ranks of a particle": start.ranks, "ZeRO": start.zero_stage}
        found |= {"trained parameters": start.parameters, "backend": start.backend}
        found |= _flat(start.swarm, "swarm") | dict(start.versions)
    return {name: str(value) for name, value in found.items()}


def _flat(section: Mapping[str, object], prefix: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in section.items():
        name = f"{prefix}.{key}"
        found |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return found
