"""Writes and reads ``metrics.jsonl``: one JSON object a line, from the leader of the swarm."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_pso._version import __version__
from ds_pso.utils.atomic_io import write_atomically

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
        records = read_metrics(self.path)
        kept = [record for record in records if record["step"] <= step]
        log.info("%s: dropped %d records after step %d", self.path, len(records) - len(kept), step)
        last = kept[-1:]
        while kept and kept[-1]["event"] == "start":  # of this run, and of earlier ones that got no further
            kept.pop()
        now = {"step": step, "time_s": kept[-1]["time_s"] if kept else 0.0}
        kept += [record | now for record in last if record["event"] == "start"]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._start = time.time() - (kept[-1]["time_s"] if kept else 0.0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a ``metrics.jsonl``; lines that a crash cut short, and one being written, are left out."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.info("%s: line %d is not complete", path, number)
    return records


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
