"""Tensors a chunk at a time: several passes over it stay in cache, and what is made on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunk_numel(device: torch.device) -> int:
    """Return the number of elements to work on at once.

    On a CPU it is as many as stay in the cache of a core, and on a GPU as keep it busy.
    """
    return 2**17 if device.type == "cpu" else 2**22


def in_chunks(*tensors: Tensor, numel: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Yield a chunk of each of several tensors of equal length at a time.

    Args:
        numel: elements of each entry along the first dimension.
    """
    size = max(chunk_numel(tensor.device) for tensor in tensors) // numel
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
