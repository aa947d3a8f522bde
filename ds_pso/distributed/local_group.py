"""The ranks of one particle, talking inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ds_pso.distributed.layout import Layout


class LocalGroup(Protocol):
    """A particle's own collectives."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return a few float64 of every rank of this particle, exactly, in the order of ranks."""


def local_device() -> torch.device:
    """Return where the particle's own collectives run, once DeepSpeed has built its world."""
    if dist.is_initialized() and "nccl" in dist.get_backend_config():  # of several, such as cpu:gloo,cuda:nccl
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class TorchLocalGroup:
    """A ``LocalGroup`` over torch's default world, which DeepSpeed has built of this particle's ranks."""

    def __init__(self, layout: Layout) -> None:
        self._size = layout.particle_size

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        if self._size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=local_device())
        rows = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]
