"""Finished runs on disk: a CSV for each table, one line appended after each run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.convergence.cells import Cell
from ds_pso.files import write_atomically

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Outcome:
    """What a run reached. Losses are means per sample, or per token; accuracies lie in [0, 1]."""

    loss: float  # on the split that the cell names, of the consensus; for "none" the mean of the particles'
    accuracy: float
    train_loss: float  # of the same model on a fixed part of the training data
    train_accuracy: float
    megabytes: float  # received by each particle, 10^6 bytes
    curve: str  # "64:0.81 128:0.9 ...": accuracy after so many steps, if the cell asks for it
    seconds: float  # of wall time, evaluations included
    how: str  # "simulated" in one process, or "real": one process per rank
    machine: str
    versions: str


class Results:
    """The rows of one CSV. A kill loses only the run in progress."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Cell, Outcome] = dict(_read(path))

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Append a row, and wait until it is on the disk."""
        if not _has_all_columns(self.path):
            write_atomically(self.path, _HEADER + "".join(_line(*row) for row in self.rows.items()))
        self.rows[cell] = outcome
        with self.path.open("a+b") as file:
            if not _ends_line(file):
                file.write(b"\n")  # behind the half of a row that a power cut left
            file.write(_line(cell, outcome).encode())
            file.flush()
            os.fsync(file.fileno())


def path_of(table: str, *, real: bool = False, scale: float = 1.0) -> Path:
    """The CSV of a table; simulated, real and scaled runs do not mix."""
    return FOLDER / f"{table}{'_real' if real else ''}{f'_x{scale:g}' if scale != 1 else ''}.csv"


_COLUMNS = [field.name for kind in (Cell, Outcome) for field in fields(kind)]
_HEADER = ",".join(_COLUMNS) + "\n"


def _line(cell: Cell, outcome: Outcome) -> str:
    text = io.StringIO()
    csv.DictWriter(text, _COLUMNS, lineterminator="\n").writerow(asdict(cell) | asdict(outcome))
    return text.getvalue()


def _has_all_columns(path: Path) -> bool:
    """False also for a file from before a column was added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.exists() and path.read_text(encoding="utf-8").startswith(_HEADER)


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _read(path: Path) -> Iterator[tuple[Cell, Outcome]]:
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():
                    yield _parse(Cell, row), _parse(Outcome, row)


def _parse(kind: Any, row: Mapping[str, str]) -> Any:
    """A ``kind``, a dataclass of numbers and strings, from the row's strings; defaults where there is no column."""
    convert = {"int": int, "float": float}
    there = [field for field in fields(kind) if field.name in row or field.default is MISSING]
    return kind(**{field.name: convert.get(str(field.type), str)(row[field.name]) for field in there})
