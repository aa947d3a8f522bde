"""What a run measured, and where the table lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.slow_link.runs import Run
from benchmarks.table import Table

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """Of the slower end."""

    step_s: float  # seconds of an optimizer step, sync points included
    bytes_per_step: float  # received on the interface, headers and acknowledgements included
    machine: str
    versions: str
    steps_per_sync: float = 0.0  # steps between two sync points; 0: as the run says
    loss: float = 0.0  # mean of both ends over the last steps; 0: not recorded
    steps: int = 0  # micro-batches of each end that had been trained on by then


class SlowLinkTable(Table[Run, Measured]):
    def __init__(self, path: Path = FOLDER / "slow_link.csv") -> None:
        super().__init__(path, Run, Measured)
