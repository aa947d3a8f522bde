"""What a run reached, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: str  # as ``str(Setting)`` says
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What it reached: losses of the mean particle, in nats per token; NaN if it diverged."""

    validation_loss: float  # on the sequences by which rates are chosen
    loss: float  # on those that the table reports
    megabytes: float  # received by each particle, 10^6 bytes
    parameters: int
    seconds: float
    machine: str
    versions: str


class Results(Table[Run, Outcome]):
    """The runs of one size."""

    def __init__(self, size: str, folder: Path = FOLDER) -> None:
        super().__init__(folder / f"{size}.csv", Run, Outcome)
