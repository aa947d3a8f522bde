"""Tensors a chunk at a time: several passes over it stay in cache, and what is made on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunk_numel(device: torch.device) -> int:
    """Elements to work on at once: on a CPU as many as stay in the cache of a core, and on a GPU as keep it busy."""
    return 2**17 if device.type == "cpu" else 2**22


def in_chunks(*tensors: Tensor, numel: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equal length, a chunk of each at a time. ``numel``: elements in a row of the first."""
    size = max(chunk_numel(tensor.device) for tensor in tensors) // numel
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
