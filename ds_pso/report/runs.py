"""What ``metrics.jsonl`` says of a run: its records, checked, and the numbers that a report gives of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Record(BaseModel):
    """What every record has. Others than those below are a script's own."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=True)

    event: str
    step: int = Field(ge=0)
    time_s: float = Field(allow_inf_nan=False)


class Losses(Record):
    """``train``, ``held_out`` and ``exported``"""

    losses: list[Number]

    @property
    def mean(self) -> float:
        """Over the particles of which a loss is known; NaN if there is none."""
        known = [loss for loss in self.losses if math.isfinite(loss)]
        return sum(known) / len(known) if known else math.nan


class Sync(Losses):
    """``sync``; what the rule noted is in ``model_extra``."""

    alive: list[bool] = []
    left_out: dict[str, str] = {}
    seconds: Number = 0.0
    waited_s: Number = 0.0
    exchange_s: Number = 0.0
    overlapped_s: Number = 0.0
    bytes_received: int = Field(default=0, ge=0)
    bandwidth_mbit_s: Number = math.nan
    drift: Number = math.nan

    @property
    def note(self) -> dict[str, Any]:
        return self.model_extra or {}

    @property
    def best(self) -> int | None:
        """The particle that the rule took for the best, or with the lowest loss; None if only one loss is known."""
        if isinstance(self.note.get("best"), int):
            return int(self.note["best"])
        alive = self.alive or [True] * len(self.losses)
        known = [(loss, i) for i, (loss, lives) in enumerate(zip(self.losses, alive, strict=False)) if lives]
        known = [(loss, i) for loss, i in known if math.isfinite(loss)]
        return min(known)[1] if len(known) > 1 else None


class Start(Record):
    """``start``"""

    description: str
    particles: int
    ranks: int
    backend: str = ""
    total_steps: int | None = None
    zero_stage: int | None = None
    parameters: int | None = None
    swarm: dict[str, Any] = {}
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Run:
    """One run as far as it has come. Times are in seconds since the start of the job."""

    path: Path  # of metrics.jsonl
    label: str
    number: int  # in the order in which runs were named
    records: Sequence[Record]
    start: Start | None = None
    resumed_at: Sequence[int] = ()  # steps
    arguments: dict[str, Any] = field(default_factory=dict)  # of train.py
    written: str = ""  # when the last record was

    def of(self, kind: type[Losses], event: str) -> list[Any]:
        return [r for r in self.records if r.event == event and isinstance(r, kind)]

    @cached_property
    def syncs(self) -> list[Sync]:
        return self.of(Sync, "sync")

    @cached_property
    def held_out(self) -> list[Losses]:
        return self.of(Losses, "held_out")

    @cached_property
    def training(self) -> Sequence[Losses]:
        """Training loss: at sync points, which are frequent, if they tell it of all particles; else at evaluations."""
        train = self.of(Losses, "train")
        everybody = all(any(math.isfinite(loss) for loss in column) for column in columns(self.syncs))
        return self.syncs if self.syncs and not (train and (self.uses_probe or not everybody)) else train

    @property
    def uses_probe(self) -> bool:
        """Whether the losses at sync points are those on a probe batch."""
        return self.start is not None and self.start.swarm.get("fitness") == "probe"

    @cached_property
    def num_particles(self) -> int:
        found = max((len(r.losses) for r in [*self.syncs, *self.held_out, *self.training]), default=1)
        return self.start.particles if self.start else found

    @property
    def description(self) -> str:
        if self.start:
            return self.start.description
        return f"{self.num_particles} particle{'s' if self.num_particles > 1 else ''}"

    @property
    def is_simulated(self) -> bool:
        return self.start is not None and self.start.backend == "simulated"

    @property
    def steps(self) -> int:
        return max((r.step for r in self.records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Of the whole training, if known."""
        asked = self.arguments.get("steps")
        return asked if isinstance(asked, int) else self.start.total_steps if self.start else None

    @property
    def is_finished(self) -> bool:
        exported = any(r.event == "exported" for r in self.records)
        return exported or (self.total_steps is not None and self.steps >= self.total_steps)

    @property
    def begin_s(self) -> float:
        """When training began: the first record, if that is of step 0."""
        return self.records[0].time_s if self.records[0].step == 0 else 0.0

    @property
    def seconds(self) -> float:
        """From the beginning to the last record of training."""
        return max((r.time_s for r in self.records if r.event != "exported"), default=self.begin_s) - self.begin_s

    @property
    def stood_still_s(self) -> float:
        return total(sync.seconds for sync in self.syncs)

    @property
    def stood_still(self) -> float:
        """Share of ``seconds`` in which training stood still at sync points."""
        return self.stood_still_s / self.seconds if self.seconds > 0 else math.nan

    @cached_property
    def _bytes(self) -> list[int]:
        return [0, *accumulate(sync.bytes_received for sync in self.syncs)]

    @cached_property
    def _sync_steps(self) -> list[int]:
        return [sync.step for sync in self.syncs]

    def bytes_by(self, step: int) -> int:
        """Received by the leader up to and with this step."""
        return self._bytes[bisect_right(self._sync_steps, step)]

    @property
    def bytes_received(self) -> int:
        return self._bytes[-1]

    @property
    def final_loss(self) -> float:
        return self.training[-1].mean if self.training else math.nan

    @property
    def final_held_out(self) -> float:
        return self.held_out[-1].mean if self.held_out else math.nan

    @property
    def exported_loss(self) -> float:
        exported = self.of(Losses, "exported")
        return exported[-1].mean if exported else math.nan


def columns(records: Sequence[Losses]) -> list[list[float]]:
    """The losses of each particle, NaN where there is none."""
    width = max((len(r.losses) for r in records), default=0)
    return [[r.losses[i] if i < len(r.losses) else math.nan for r in records] for i in range(width)]


def total(values: Any) -> float:
    """Of those that are known."""
    return sum(value for value in values if math.isfinite(value))
