"""What a search reached, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One search."""

    target: str
    row: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What it reached: losses in nats per token.

    Attributes:
        loss: on the sequences by which was searched.
        test_loss: on others.
        by: who proposed the winner.
        curve: best loss by evaluation, ``number:loss`` where it improved.
    """

    loss: float
    test_loss: float
    evaluations: int
    by: str
    curve: str
    seconds: float
    machine: str
    versions: str


class Results(Table[Run, Outcome]):
    """The runs of one size."""

    def __init__(self, size: str, folder: Path = FOLDER) -> None:
        super().__init__(folder / f"{size}.csv", Run, Outcome)
