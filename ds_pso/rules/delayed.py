"""Multi-step delayed updates: averaging that waits for nothing and meets when it is worth it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from ds_pso.rules.local_sgd import LocalSGD

_DELAY = 4
_FRAGMENTS = 4


class Delayed(LocalSGD):
    """``local_sgd``, and defaults of the section that make a sync point late, in pieces and adaptive.

    x_i <- mean_j x_j(t) + (x_i - x_i(t)), applied ``delay`` steps after t, fragment by fragment. What a particle has
    learned since the last sync point travels as one aggregated update; the second term is the parameter correction.
    Moves one all-reduce of the shard and keeps no state, but a copy of the shard on its way.
    """

    @classmethod
    def complete(cls, section: MutableMapping[str, Any]) -> None:
        delay = section.setdefault("delay", _DELAY)
        if isinstance(delay, int) and not isinstance(delay, bool) and delay >= 0:  # else it will be refused
            section.setdefault("fragments", max(1, min(_FRAGMENTS, delay)))
            section.setdefault("sync_interval", max(8, 2 * delay))
            section.setdefault("schedule", {"type": "adaptive", "min_interval": max(1, delay)})
