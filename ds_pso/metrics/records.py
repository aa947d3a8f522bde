"""The record of a sync, as ``Swarm.on_sync`` hands it out and ``metrics.jsonl`` keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_OPTIONAL = ("left_out", "repeated", "lr_factors", "fragments_staleness", "fragments_s")
_UNSET = ("present", "recovered", "fragment", "abandoned")


@dataclass(frozen=True)
class SyncRecord:
    """One sync. Sequences have an entry for each particle unless said otherwise; seconds and bytes are this rank's.

    Attributes:
        sync: how many syncs came before.
        losses: fitness; NaN where none is known.
        alive: false: left out.
        left_out: why, by the particle's number.
        drift: how far the particles were from what they received: root mean square, relative to its norm.
        staleness: optimizer steps from the beginning of the sync to its end; 0 where training waited.
        next_interval: optimizer steps from this sync to the next.
        seconds: for which training stood still, waiting included.
        waited_s: until the last peer had come.
        exchange_s: inside collectives.
        overlapped_s: beside training.
        step_s: of an optimizer step of the slowest particle since the last sync.
        bytes_received: by this rank.
        bandwidth_mbit_s: of these bytes in ``exchange_s``.
        repeated: collectives that were damaged on the way.
        lr_factors: what learning rates are multiplied by, if the rule says so.
        present: particles that took part, in an elastic swarm.
        recovered: of these, those that took over the state of another.
        fragment: whose turn it was, when streaming.
        abandoned: whether it has to wait for a sync of the whole model, when streaming.
        fragments_staleness: of each fragment.
        fragments_s: seconds after the beginning at which each fragment had come.
        note: what the rule noted, such as ``weights`` or ``best``.
    """

    sync: int
    losses: Sequence[float]
    alive: Sequence[bool]
    left_out: Mapping[str, str] = field(default_factory=dict)
    drift: float = math.nan
    staleness: int = 0
    next_interval: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    exchange_s: float = 0.0
    overlapped_s: float = 0.0
    step_s: float = math.nan
    bytes_received: int = 0
    bandwidth_mbit_s: float = math.nan
    repeated: int = 0
    lr_factors: Sequence[float] = ()
    present: Sequence[int] | None = None
    recovered: Sequence[int] | None = None
    fragment: int | None = None
    abandoned: bool | None = None
    fragments_staleness: Sequence[int] = ()
    fragments_s: Sequence[float] = ()
    note: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it flat, without what has no meaning here; NaN stays NaN."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "note"}
        unset = {name for name in _OPTIONAL if not values[name]} | {name for name in _UNSET if values[name] is None}
        return {name: value for name, value in values.items() if name not in unset} | dict(self.note)
