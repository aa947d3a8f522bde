"""Reads runs from files; what is no ``metrics.jsonl`` is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from ds_pso.errors import ConfigError
from ds_pso.metrics.log import Oddities, raw_lines, read_lines
from ds_pso.metrics.records import Entry, LossRecord, SyncRecord, entry_from_json, plain_sync, tame
from ds_pso.report.runs import Run
from ds_pso.report.thinning import Thinned, Totals

DRAWN = ("sync", "train", "held_out", "exported")  # events; of others only steps and times count


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return each run once, in the order in which they were named; labels are unequal.

    Raises:
        ConfigError: names the file or folder that holds no metrics.
    """
    files = list({file.resolve(): file for file in map(_find, paths)}.values())
    names = [Path(_place(file.resolve())).stem for file in files]
    labels = names if len(set(names)) == len(names) else [_place(file) for file in files]
    return [_read(file, label, number) for number, (file, label) in enumerate(zip(files, labels, strict=True))]


def _place(file: Path) -> str:
    return str(file.parent if file.name == "metrics.jsonl" else file)


def _find(path: Path) -> Path:
    if path.is_dir():
        if not (path / "metrics.jsonl").is_file():
            raise ConfigError(f"{path}: holds no metrics.jsonl; give a folder that was the run_dir of ds_pso.init")
        return path / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path}: no such run; give a run folder or its metrics.jsonl")
    return path


def _read(path: Path, label: str, number: int) -> Run:
    oddities = Oddities(path)
    try:
        size, written = path.stat().st_size, path.stat().st_mtime  # a run that goes on writes more meanwhile
        totals, entries = _collect(_of_last_life(path, size, oddities))
    except ValidationError as error:
        raise ConfigError(f"{path}: not the metrics of a run ({_reason(error)}); give a metrics.jsonl") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not entries:
        reason = "no UTF-8 text"
        if reason in oddities.first:
            raise ConfigError(f"{path}: not the metrics of a run ({reason}); give a metrics.jsonl")
        raise ConfigError(f"{path}: holds no record of a run; give a metrics.jsonl, or wait until the run has begun")
    oddities.report()
    return Run(
        path,
        label,
        number,
        entries,
        totals,
        arguments=_arguments(path.with_name("config.json")),
        written=datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _reason(error: ValidationError) -> str:
    item = error.errors()[0]
    name = ".".join(str(part) for part in item["loc"])
    return f"{name}: {item['msg']}" if name else str(item["msg"])


def _collect(found: Iterable[Entry[object]]) -> tuple[Totals, list[Entry[object]]]:
    """Count all entries, and keep those that are drawn, thinned out, in their order."""
    totals, starts, events = Totals(), [], {event: Thinned() for event in DRAWN}
    for place, entry in enumerate(found):
        totals.add(entry)
        if entry.event == "start":
            starts.append((place, entry))
        elif entry.event in events and isinstance(entry.record, SyncRecord | LossRecord):
            events[entry.event].add(place, cast("Entry[SyncRecord | LossRecord]", entry))
    placed = [*starts, *(item for thinned in events.values() for item in thinned.entries())]
    return totals, [entry for _, entry in sorted(placed, key=lambda item: item[0])]


def _of_last_life(path: Path, size: int, oddities: Oddities) -> Iterator[Entry[object]]:
    """Yield entries, without those before the run began, or after the checkpoint from which it went on.

    A start drops entries of later steps that stand before it, or all if it is not resumed, and what had been exported.
    So the file is read twice: first for its starts.
    """
    starts = _starts(path, size)
    limits = list(accumulate((step if step > 0 else -1 for _, step in reversed(starts)), min))[::-1]
    numbers, following, is_first = [number for number, _ in starts], 0, True
    for number, line in read_lines(path, oddities, size):
        while following < len(numbers) and numbers[following] < number:
            following += 1
        entry = plain_sync(line)
        if entry is None:
            values, is_odd = tame(line)
            try:
                entry = entry_from_json(values)
            except ValidationError as error:
                if is_first and not is_odd:
                    raise
                oddities.add(number, f"is left out ({_reason(error)})")
                continue
            if is_odd:
                oddities.add(number, "has a number that is too large, which is read as unknown")
        is_first = False
        if entry.event == "start":
            if following == len(numbers) or numbers[following] != number:
                continue  # nothing came of it, or not yet
            later = following + 1
        else:
            later = following
        if later < len(limits) and (entry.step > limits[later] or entry.event == "exported"):
            continue
        yield entry


def _starts(path: Path, size: int) -> list[tuple[int, int]]:
    """Return line number and step of each start that something came of."""
    found: list[tuple[int, int]] = []
    last: tuple[int, int] | None = None  # a start, and nothing came after it yet
    has_others = False
    with path.open("rb") as file:
        for number, line in enumerate(raw_lines(file, size), 1):
            text = line.strip()
            if not (text.startswith(b"{") and text.endswith(b"}")):
                continue
            step = _step_of_start(text) if b'"start"' in text else None
            if step is None:
                found += [last] if last else []
                last, has_others = None, True
            else:
                last = (number, step)
    if last and not found and not has_others:
        found.append(last)
    return found


def _step_of_start(text: bytes) -> int | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(values, dict) and values.get("event") == "start" and isinstance(values.get("step"), int):
        return int(values["step"])
    return None


def _arguments(config: Path) -> dict[str, object]:
    """Read those that ``train.py`` has written beside the metrics; none if another script did."""
    try:
        arguments = json.loads(config.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
