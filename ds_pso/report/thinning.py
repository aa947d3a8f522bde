"""Runs of any length in bounded memory: of too many records neighbours become one, while totals count all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from ds_pso.metrics.records import Entry, LossRecord, SyncRecord

LIMIT = 1024  # of each event at least so many records are drawn, if there are as many; and at most twice as many

Recorded = SyncRecord | LossRecord


def best_particle(sync: SyncRecord) -> int | None:
    """Return the particle that the rule took for the best, or with the lowest loss; None if only one loss is known."""
    best = sync.note.get("best")
    if isinstance(best, int):
        return best
    alive = sync.alive or [True] * len(sync.losses)
    known = [(loss, i) for i, (loss, lives) in enumerate(zip(sync.losses, alive, strict=False)) if lives]
    known = [(loss, i) for loss, i in known if math.isfinite(loss)]
    return min(known)[1] if len(known) > 1 else None


@dataclass
class Totals:
    """Numbers of all records of a run, however many are kept.

    Attributes:
        steps: the last one.
        begin_s: when training began: the first entry, if that is of step 0.
        end_s: the time of the last entry of training.
        counts: records of each event.
        stood_still_s: seconds in which training stood still at sync points.
        winners: at how many syncs each particle was the best; None: nobody.
        left_out: of how many syncs each particle was.
        reasons: why it was, the last time that a record says so.
        guards: what the guard preferred, and how often.
        weights_are_alike: at every sync that notes weights; None: none does.
    """

    steps: int = 0
    begin_s: float = 0.0
    end_s: float = -math.inf
    counts: Counter[str] = field(default_factory=Counter)
    stood_still_s: float = 0.0
    winners: Counter[int | None] = field(default_factory=Counter)
    left_out: Counter[int] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    guards: Counter[str] = field(default_factory=Counter)
    weights_are_alike: bool | None = None

    def add(self, entry: Entry[object]) -> None:
        """Count an entry."""
        if not self.counts:
            self.begin_s = entry.time_s if entry.step == 0 else 0.0
        self.counts[entry.event] += 1
        self.steps = max(self.steps, entry.step)
        if entry.event != "exported":
            self.end_s = max(self.end_s, entry.time_s)
        if isinstance(entry.record, SyncRecord):
            self._add_sync(entry.record)

    def _add_sync(self, sync: SyncRecord) -> None:
        if math.isfinite(sync.seconds):
            self.stood_still_s += sync.seconds
        self.winners[best_particle(sync)] += 1
        if not all(sync.alive):
            self.left_out.update(particle for particle, alive in enumerate(sync.alive) if not alive)
        self.reasons |= sync.left_out
        if "guard" in sync.note:
            self.guards[str(sync.note["guard"])] += 1
        weights = sync.note.get("weights")
        if isinstance(weights, list) and weights:
            alike = all(share == weights[0] for share in weights)
            self.weights_are_alike = alike and self.weights_are_alike is not False


class Thinned:
    """The records of one event, about twice LIMIT of them at most; the newest one stays as it is."""

    def __init__(self) -> None:
        self._size = 1  # records that become one
        self._kept: list[tuple[int, Entry[Recorded]]] = []  # with their places among all entries
        self._pending: list[tuple[int, Entry[Recorded]]] = []
        self._newest: tuple[int, Entry[Recorded]] | None = None

    def add(self, place: int, entry: Entry[Recorded]) -> None:
        """Take one more.

        Args:
            place: counts the entries of the run, of all events.
        """
        if self._newest is not None:
            self._pending.append(self._newest)
            if len(self._pending) == self._size:
                self._kept.append(_joined(self._pending))
                self._pending = []
            if len(self._kept) == 2 * LIMIT:
                self._kept = [_joined(self._kept[i : i + 2]) for i in range(0, len(self._kept), 2)]
                self._size *= 2
        self._newest = (place, entry)

    def entries(self) -> Iterator[tuple[int, Entry[Recorded]]]:
        """Yield what is kept, with places."""
        yield from self._kept
        if self._pending:
            yield _joined(self._pending)
        if self._newest is not None:
            yield self._newest


def _joined(placed: Sequence[tuple[int, Entry[Recorded]]]) -> tuple[int, Entry[Recorded]]:
    if len(placed) == 1:
        return placed[0]
    place, last = placed[-1]
    return place, replace(last, record=join([entry.record for _, entry in placed]))


def join(records: Sequence[Recorded]) -> Recorded:
    """Return one record for neighbours: means of what is finite, sums of bytes, and of all else the last."""
    last, losses = records[-1], _mean_of_lists([record.losses for record in records])
    syncs = [record for record in records if isinstance(record, SyncRecord)]
    if not isinstance(last, SyncRecord) or len(syncs) < len(records):
        return replace(last, losses=losses)
    left_out: dict[str, str] = {}
    for sync in syncs:
        left_out |= sync.left_out
    return replace(
        last,
        losses=losses,
        alive=[all(flags) for flags in zip(*(sync.alive for sync in syncs), strict=False)],
        left_out=left_out,
        drift=_mean([sync.drift for sync in syncs]),
        staleness=round(_mean([sync.staleness for sync in syncs])),
        next_interval=round(_mean([sync.next_interval for sync in syncs])),
        seconds=_mean([sync.seconds for sync in syncs]),
        waited_s=_mean([sync.waited_s for sync in syncs]),
        exchange_s=_mean([sync.exchange_s for sync in syncs]),
        overlapped_s=_mean([sync.overlapped_s for sync in syncs]),
        step_s=_mean([sync.step_s for sync in syncs]),
        bytes_received=sum(sync.bytes_received for sync in syncs),
        bandwidth_mbit_s=_mean([sync.bandwidth_mbit_s for sync in syncs if sync.bytes_received]),
        lr_factors=_mean_of_lists([sync.lr_factors for sync in syncs]),
        note=_joined_notes([sync.note for sync in syncs]),
    )


def _joined_notes(notes: Sequence[Mapping[str, object]]) -> dict[str, object]:
    joined: dict[str, object] = {}
    for key in dict.fromkeys(key for note in notes for key in note):
        values = [note[key] for note in notes if key in note]
        numbers = [value for value in values if is_number(value)]
        rows = [value for value in values if isinstance(value, list) and all(map(is_number, value))]
        if key != "best" and len(numbers) == len(values):
            joined[key] = _mean(numbers)
        elif rows and len(rows) == len(values) and len({len(row) for row in rows}) == 1:
            joined[key] = _mean_of_lists(rows)
        else:
            joined[key] = values[-1]
    return joined


def is_number(value: object) -> TypeGuard[float]:
    """Return true for what can be drawn; a flag is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _mean_of_lists(rows: Sequence[Sequence[float]]) -> list[float]:
    width = max(map(len, rows), default=0)
    return [_mean([row[i] for row in rows if i < len(row)]) for i in range(width)]
