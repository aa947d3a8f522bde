"""Finished runs on disk: a CSV with one line appended after each run. And what they ran on."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import deepspeed
import torch

import ds_pso
from ds_pso.utils.atomic_io import write_atomically

Key = TypeVar("Key")
Value = TypeVar("Value")


class Table(Generic[Key, Value]):
    """The rows of one CSV. A kill loses only the run in progress.

    Args:
        key, value: frozen dataclasses of numbers and strings: which run it is, and what came of it.
    """

    def __init__(self, path: Path, key: type[Key], value: type[Value]) -> None:
        self.path = path
        self._key, self._value = key, value
        self._columns = [field.name for kind in (key, value) for field in fields(kind)]  # type: ignore[arg-type]
        self._header = ",".join(self._columns) + "\n"
        self.rows: dict[Key, Value] = dict(self._read())

    def add(self, key: Key, value: Value) -> None:
        """Append a row, and wait until it is on the disk."""
        if not self._has_all_columns():
            write_atomically(self.path, self._header + "".join(self._line(*row) for row in self.rows.items()))
        self.rows[key] = value
        with self.path.open("a+b") as file:
            if not _ends_line(file):
                file.write(b"\n")  # behind the half of a row that a power cut left
            file.write(self._line(key, value).encode())
            file.flush()
            os.fsync(file.fileno())

    def _line(self, key: Any, value: Any) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(asdict(key) | asdict(value))
        return text.getvalue()

    def _has_all_columns(self) -> bool:
        """False also for a file from before a column was added."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.exists() and self.path.read_text(encoding="utf-8").startswith(self._header)

    def _read(self) -> Iterator[tuple[Key, Value]]:
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    if None not in row.values():
                        yield _parse(self._key, row), _parse(self._value, row)


def machine() -> str:
    """``2 CPU cores (x86_64)``, or the names of the GPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def versions() -> str:
    return f"ds_pso {ds_pso.__version__}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _parse(kind: Any, row: Mapping[str, str]) -> Any:
    """A ``kind`` from the row's strings; defaults where there is no column."""
    convert: dict[str, Any] = {"int": int, "float": float, "bool": "True".__eq__}
    there = [field for field in fields(kind) if field.name in row or field.default is MISSING]
    return kind(**{field.name: convert.get(str(field.type), str)(row[field.name]) for field in there})
