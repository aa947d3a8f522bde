"""Reads runs from files; what is no ``metrics.jsonl`` is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from ds_pso.errors import ConfigError
from ds_pso.metrics.log import read_metrics
from ds_pso.metrics.records import Entry, entry_from_json
from ds_pso.report.runs import Run


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
    try:
        found = [entry_from_json(line) for line in read_metrics(path)]
    except (UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: not the metrics of a run ({_reason(error)}); give a metrics.jsonl") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not found:
        raise ConfigError(f"{path}: holds no record of a run; give a metrics.jsonl, or wait until the run has begun")
    return Run(
        path,
        label,
        number,
        _last_life(found),
        arguments=_arguments(path.with_name("config.json")),
        written=datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _reason(error: UnicodeDecodeError | ValidationError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "no UTF-8 text"
    item = error.errors()[0]
    name = ".".join(str(part) for part in item["loc"])
    return f"{name}: {item['msg']}" if name else str(item["msg"])


def _last_life(entries: Sequence[Entry[object]]) -> list[Entry[object]]:
    """Leave out what stood in the file before the run began, and what followed the checkpoint it went on from."""
    kept: list[Entry[object]] = []
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        if entry.event == "start":
            if (following.event == "start") if following else kept:
                continue  # nothing came of it, or not yet
            kept = [e for e in kept if 0 < entry.step >= e.step and e.event != "exported"]
        kept.append(entry)
    return kept


def _arguments(config: Path) -> dict[str, object]:
    """Read those that ``train.py`` has written beside the metrics; none if another script did."""
    try:
        arguments = json.loads(config.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
