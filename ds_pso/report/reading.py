"""From files to runs; what is no ``metrics.jsonl`` is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_pso.errors import ConfigError
from ds_pso.metrics.log import read_metrics
from ds_pso.report.runs import Losses, Record, Run, Start, Sync


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each run once, in the order in which they were named; labels are unequal.

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
        found = [_check(values) for values in read_metrics(path)]
    except (UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: not the metrics of a run ({_reason(error)}); give a metrics.jsonl") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not found:
        raise ConfigError(f"{path}: holds no record of a run; give a metrics.jsonl, or wait until the run has begun")
    records = _last_life(found)
    starts = [r for r in records if isinstance(r, Start)]
    return Run(
        path,
        label,
        number,
        records,
        start=starts[-1] if starts else None,
        resumed_at=[r.step for r in starts if r.step > 0],
        arguments=_arguments(path.with_name("config.json")),
        written=datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _check(values: Any) -> Record:
    kinds: dict[str, type[Record]] = {"sync": Sync, "start": Start}
    record = Record.model_validate(values)
    if record.event in kinds:
        return kinds[record.event].model_validate(values)
    try:
        return Losses.model_validate(values)
    except ValidationError:
        return record  # a script may log what it likes


def _reason(error: UnicodeDecodeError | ValidationError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "no UTF-8 text"
    item = error.errors()[0]
    name = ".".join(str(part) for part in item["loc"])
    return f"{name}: {item['msg']}" if name else str(item["msg"])


def _last_life(records: Sequence[Record]) -> list[Record]:
    """Without what stood in the file before the run began, or was written after the checkpoint it went on from."""
    kept: list[Record] = []
    for record, following in zip(records, [*records[1:], None], strict=True):
        if isinstance(record, Start):
            if isinstance(following, Start) or (following is None and kept):
                continue  # nothing came of it, or not yet
            kept = [r for r in kept if 0 < record.step >= r.step and r.event != "exported"]
        kept.append(record)
    return kept


def _arguments(config: Path) -> dict[str, Any]:
    """Those that ``train.py`` has written beside the metrics; none if somebody else did."""
    try:
        arguments = json.loads(config.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
