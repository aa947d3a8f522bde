"""Writes and reads ``metrics.jsonl``: one JSON object a line, from the leader of the swarm."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from ds_pso._version import __version__
from ds_pso.utils.atomic_io import replacing_file

log = logging.getLogger(__name__)


class MetricsLog:
    """The file that records are appended to; with no path they are dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._start = time.time()

    def write(self, event: str, step: int, values: Mapping[str, object]) -> None:
        """Append a line; NaN and infinities become null."""
        if self.path is None:
            return
        record = {"event": event, "step": step, "time_s": round(time.time() - self._start, 3), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what a run wrote after ``step`` before it was resumed from there, where its new ``start`` belongs."""
        if self.path is None or not self.path.exists():
            return
        oddities, kept_s, dropped = Oddities(self.path), 0.0, 0
        starts: list[dict[str, Any]] = []  # since the last other record
        last: dict[str, Any] = {}
        with replacing_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for _, record in read_lines(self.path, oddities):
                if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] > step:
                    dropped += 1
                    continue
                last = record
                if record.get("event") == "start":  # of this run, or of an earlier one that got no further
                    starts.append(record)
                    continue
                for line in (*starts, record):
                    file.write(json.dumps(line) + "\n")
                starts = []
                kept_s = record["time_s"] if isinstance(record.get("time_s"), int | float) else kept_s
            if last.get("event") == "start":
                file.write(json.dumps(last | {"step": step, "time_s": kept_s}) + "\n")
        log.info("%s: dropped %d records after step %d", self.path, dropped, step)
        oddities.report()
        self._start = time.time() - kept_s


@dataclass
class Oddities:
    """The lines of a file that cannot be read as they stand: the first one, and how many there are."""

    path: Path
    count: int = 0
    first: str = ""

    def add(self, number: int, reason: str) -> None:
        """Count a line."""
        self.count += 1
        self.first = self.first or f"line {number}: {reason}"

    def report(self) -> None:
        """Warn of them, in one line."""
        if self.count:
            more = f"; and {self.count - 1} more such lines" if self.count > 1 else ""
            log.warning("%s: %s%s", self.path, self.first, more)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a ``metrics.jsonl``; lines that a crash cut short, and one being written, are left out."""
    oddities = Oddities(path)
    records = [record for _, record in read_lines(path, oddities)]
    oddities.report()
    return records


def read_lines(path: Path, oddities: Oddities, end: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yield number and JSON value of each line; what is none is left out.

    Args:
        oddities: counts these lines.
        end: bytes of the file to read; None: all.
    """
    with path.open("rb") as file:
        for number, line in enumerate(raw_lines(file, end), 1):
            if not line.strip():
                continue
            try:
                value = _parse(line)
            except UnicodeDecodeError:
                oddities.add(number, "is left out (no UTF-8 text)")
            except (ValueError, RecursionError) as error:
                oddities.add(number, f"is left out ({_in_a_few_words(error)})")
            else:
                yield number, value


def raw_lines(file: BinaryIO, end: int | None = None) -> Iterator[bytes]:
    """Yield the lines of the first ``end`` bytes; of one that is too long to be a record only the beginning."""
    left = sys.maxsize if end is None else end
    while line := file.readline(min(_LONGEST, left)):
        left -= len(line)
        rest = line
        while len(rest) == _LONGEST and not rest.endswith(b"\n"):
            rest = file.readline(min(_LONGEST, left))
            left -= len(rest)
        yield line


_LONGEST = 2**24  # bytes of a line
_DEEPEST = 32  # lists and objects inside one another


def _parse(line: bytes) -> Any:
    value = json.loads(line.decode("utf-8"))
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise RecursionError
    return value


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _in_a_few_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}: cut short, or no JSON"
    return "too many brackets inside one another" if isinstance(error, RecursionError) else str(error)


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on most."""
    return {"ds_pso": __version__, **{name: version(name) for name in ("torch", "deepspeed")}}


def _plain(value: object) -> object:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
