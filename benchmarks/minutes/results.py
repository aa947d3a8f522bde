"""What a run reached, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training."""

    row: str
    bandwidth: str  # empty: one machine alone
    minutes: float  # of training
    lr: float
    seed: int
    search: bool  # to find the learning rate
    model: str


@dataclass(frozen=True)
class Outcome:
    """What it reached. Losses: of the mean weights of both ends, in nats per token; NaN if it diverged."""

    validation_loss: float  # at the end, on the sequences by which rates are chosen
    loss: float  # at the end, on those that the page reports
    curve: str  # "minutes:loss" of each snapshot, on the same sequences, with blanks between
    steps: int  # micro-batches of an end
    step_s: float  # seconds of one, everything included
    tokens_per_s: float  # of all ends that train one model
    bytes_per_step: float  # received by an end in a step on the interface
    parameters: int
    machine: str
    versions: str


class Results(Table[Run, Outcome]):
    """All runs, those that find learning rates too."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder / "minutes.csv", Run, Outcome)
