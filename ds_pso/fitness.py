"""The fitness of a particle: its mean training loss since the last sync point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class FitnessWindow:
    """Sums the losses of one rank. Adding does not wait for the device."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self.count = 0  # of losses
        self.steps = 0  # of the optimizer

    def add(self, loss: Tensor) -> None:
        """``loss``: scalar of one micro-batch, before any loss scaling."""
        self._sum = self._sum + loss.detach().to(torch.float64)
        self.count += 1

    @property
    def total(self) -> float:
        return float(self._sum)

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


def combine(rows: Sequence[Sequence[float]]) -> tuple[float, bool]:
    """Reduce (sum of losses, number of losses, weights finite) of the ranks of one particle.

    Returns:
        The mean loss, NaN if there was none, and whether the particle is alive: its weights are
        finite on every rank and its loss, if it has one, is finite. Rows are added in the order
        of ranks, so every rank computes the same bits.
    """
    total = sum(row[0] for row in rows)
    count = sum(row[1] for row in rows)
    weights_finite = all(row[2] == 1.0 for row in rows)
    loss = total / count if count else math.nan
    return loss, weights_finite and (not count or math.isfinite(loss))
