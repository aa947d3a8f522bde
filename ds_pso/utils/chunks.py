"""Tensors a chunk at a time: several passes over it stay in cache, and what is made on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

_ON_CPU, _ON_GPU = 2**17, 2**22


def chunk_numel(device: torch.device) -> int:
    """Return the number of elements to work on at once.

    On a CPU it is as many as stay in the cache of a core, and on a GPU as keep it busy.
    """
    return _ON_CPU if device.type == "cpu" else _ON_GPU


def in_chunks(*tensors: Tensor, numel: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Yield a chunk of each of several tensors of equal length at a time.

    Args:
        numel: elements of each entry along the first dimension.
    """
    on_cpu = {"cpu"}.issuperset(map(attrgetter("device.type"), tensors))
    size = (_ON_CPU if on_cpu else _ON_GPU) // numel
    return zip(*map(methodcaller("split", size), tensors), strict=True)
