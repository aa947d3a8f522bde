"""A run, read from ``metrics.jsonl``, and the numbers that a report gives of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar, cast

from ds_pso.metrics.records import Entry, LossRecord, StartRecord, SyncRecord
from ds_pso.report.thinning import Totals

Record = TypeVar("Record")


@dataclass(frozen=True)
class Run:
    """One run as far as it has come. Times are in seconds since the start of the job."""

    path: Path  # of metrics.jsonl
    label: str
    number: int  # in the order in which runs were named
    entries: Sequence[Entry[object]]  # those that are drawn; of too many neighbours are joined
    totals: Totals  # of all of them
    arguments: Mapping[str, object] = field(default_factory=dict)  # of train.py
    written: str = ""  # when the last entry was

    def of(self, kind: type[Record], event: str) -> list[Entry[Record]]:
        """Entries of this event that hold such a record."""
        found = [entry for entry in self.entries if entry.event == event and isinstance(entry.record, kind)]
        return cast("list[Entry[Record]]", found)

    @cached_property
    def start(self) -> Entry[StartRecord] | None:
        """The last start, which is another than the first if the run was resumed."""
        return next(reversed(self.of(StartRecord, "start")), None)

    @property
    def resumed_at(self) -> list[int]:
        """Steps from which it went on."""
        return [entry.step for entry in self.of(StartRecord, "start") if entry.step > 0]

    @cached_property
    def syncs(self) -> list[Entry[SyncRecord]]:
        return self.of(SyncRecord, "sync")

    @cached_property
    def held_out(self) -> list[Entry[LossRecord]]:
        return self.of(LossRecord, "held_out")

    @cached_property
    def training(self) -> Sequence[Entry[SyncRecord | LossRecord]]:
        """Training loss: at sync points, which are frequent, if they know it of all particles; else at evaluations."""
        train = self.of(LossRecord, "train")
        all_known = all(any(math.isfinite(loss) for loss in column) for column in columns(self.syncs))
        return self.syncs if self.syncs and not (train and (self.uses_probe or not all_known)) else train

    @property
    def uses_probe(self) -> bool:
        """True if the losses at sync points are those on a probe batch."""
        return self.start is not None and self.start.record.swarm.get("fitness") == "probe"

    @cached_property
    def num_particles(self) -> int:
        if self.start:
            return self.start.record.particles
        return max(1, *(len(columns(entries)) for entries in (self.syncs, self.held_out, self.training)))

    @property
    def has_sync_points(self) -> bool:
        """False for plain DeepSpeed."""
        return self.num_particles > 1 or (self.start is not None and self.start.record.sync_points)

    @property
    def description(self) -> str:
        if self.start:
            return self.start.record.description
        return f"{self.num_particles} particle{'s' if self.num_particles > 1 else ''}"

    @property
    def is_simulated(self) -> bool:
        return self.start is not None and self.start.record.backend == "simulated"

    @property
    def steps(self) -> int:
        return self.totals.steps

    @property
    def num_syncs(self) -> int:
        return self.totals.counts["sync"]

    @property
    def num_training(self) -> int:
        """Records of the training loss, however many are drawn."""
        return self.totals.counts["sync" if self.training is self.syncs else "train"] if self.training else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training, if known."""
        asked = self.arguments.get("steps")
        return asked if isinstance(asked, int) else self.start.record.total_steps if self.start else None

    @property
    def is_finished(self) -> bool:
        exported = self.totals.counts["exported"] > 0
        return exported or (self.total_steps is not None and self.steps >= self.total_steps)

    @property
    def begin_s(self) -> float:
        """When training began: the first entry, if that is of step 0."""
        return self.totals.begin_s

    @property
    def seconds(self) -> float:
        """Time from the beginning to the last entry of training."""
        return max(self.totals.end_s, self.begin_s) - self.begin_s if self.totals.end_s > -math.inf else 0.0

    @property
    def stood_still_s(self) -> float:
        return self.totals.stood_still_s

    @property
    def stood_still(self) -> float:
        """Share of ``seconds`` in which training stood still at sync points."""
        return self.stood_still_s / self.seconds if self.seconds > 0 else math.nan

    @cached_property
    def _bytes(self) -> list[int]:
        return [0, *accumulate(sync.record.bytes_received for sync in self.syncs)]

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
        return mean(self.training[-1].record.losses) if self.training else math.nan

    @property
    def final_held_out(self) -> float:
        return mean(self.held_out[-1].record.losses) if self.held_out else math.nan

    @property
    def exported_loss(self) -> float:
        exported = self.of(LossRecord, "exported")
        return mean(exported[-1].record.losses) if exported else math.nan


def mean(losses: Sequence[float]) -> float:
    """Mean over the particles of which a loss is known; NaN if there is none."""
    known = [loss for loss in losses if math.isfinite(loss)]
    return sum(known) / len(known) if known else math.nan


def columns(entries: Sequence[Entry[SyncRecord | LossRecord]]) -> list[list[float]]:
    """Return the losses of each particle, NaN where there is none."""
    rows = [entry.record.losses for entry in entries]
    return [[row[i] if i < len(row) else math.nan for row in rows] for i in range(max(map(len, rows), default=0))]
