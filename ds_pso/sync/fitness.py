"""The fitness of a particle: its mean training loss since the last sync point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_pso.sync.health import Health


class FitnessWindow:
    """Sums the losses of one rank. Adding does not wait for the device."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._first: Tensor | float = math.nan
        self.count = 0  # of losses
        self.steps = 0  # of the optimizer

    def add(self, loss: Tensor) -> None:
        """``loss``: scalar of one micro-batch, before any loss scaling."""
        loss = loss.detach().to(torch.float64)
        if isinstance(self._first, float):
            self._first = loss
        self._sum = self._sum + loss
        self.count += 1

    @property
    def total(self) -> float:
        return float(self._sum)

    @property
    def first(self) -> float:
        """The first loss of all that was ever added; NaN if there was none."""
        return float(self._first)

    def state(self) -> list[float]:
        return [self.total, self.count, self.steps]

    def restore(self, total: float, count: int, steps: int) -> None:
        self._sum, self.count, self.steps = total, count, steps

    def give_back(self, total: float, count: int, steps: int) -> None:
        """Count again what ``state`` said before the window was emptied."""
        self.restore(self.total + total, self.count + count, self.steps + steps)

    def clear_losses(self) -> None:
        self._sum, self.count = 0.0, 0

    def clear(self) -> None:
        self.restore(0.0, 0, 0)


def combine(rows: Sequence[Sequence[float]]) -> Health:
    """Reduce (sum of losses, number of losses, sum of the squares of the weights, first loss) of a particle's ranks.

    Returns:
        The mean loss, NaN if there was none, the norm of all weights, and the mean of the first losses as the highest
        so far. Rows are added in the order of ranks, so every rank computes the same bits.
    """
    total = sum(row[0] for row in rows)
    count = sum(row[1] for row in rows)
    loss = total / count if count else math.nan
    heard = float(count) if not count or math.isfinite(loss) else -1.0
    return Health(loss, heard, math.sqrt(sum(row[2] for row in rows)), sum(row[3] for row in rows) / len(rows))
