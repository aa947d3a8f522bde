"""What a run reached, and where the tables lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.convergence.cells import Cell
from benchmarks.table import Table

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


class Results(Table[Cell, Outcome]):
    """The rows of one table."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Cell, Outcome)


def path_of(table: str, *, real: bool = False, scale: float = 1.0) -> Path:
    """The CSV of a table; simulated, real and scaled runs do not mix."""
    return FOLDER / f"{table}{'_real' if real else ''}{f'_x{scale:g}' if scale != 1 else ''}.csv"
