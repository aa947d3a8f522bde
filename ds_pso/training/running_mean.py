"""The mean of many losses, of which none is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RunningMean:
    """Sums scalars where they lie, without waiting for the device.

    A list of them would hold a small piece of memory from each step, between which the allocator cannot give back what
    the activations of that step have taken.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # float64, shape ()
        self._count = 0

    def add(self, value: Tensor) -> None:
        """``value``: shape ()."""
        if self._sum is None:
            self._sum = torch.zeros((), dtype=torch.float64, device=value.device)
        self._sum += value.detach()
        self._count += 1

    def take(self) -> float:
        """Return the mean of what was added since the last call; NaN if nothing was."""
        mean = float(self._sum) / self._count if self._sum is not None and self._count else math.nan
        if self._sum is not None:
            self._sum.zero_()
        self._count = 0
        return mean
