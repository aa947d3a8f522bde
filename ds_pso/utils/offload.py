"""The device and the precision of state from one sync point to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Offload:
    """Moves tensors like the shards to where they are kept. The defaults keep them as they are."""

    device: Literal["auto", "cpu"] = "auto"  # "auto": as they come
    rough_dtype: Literal["fp32", "bf16"] = "fp32"  # of tensors that may be rounded

    def near(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device where state is kept."""
        return tensor.cpu() if self.device == "cpu" else tensor

    def keep(self, tensor: Tensor, *, rough: bool = False) -> Tensor:
        """Return the tensor as it is kept; a copy only if it has to be one.

        Args:
            rough: it may be rounded.
        """
        kept = self.near(tensor.bfloat16() if rough and self.rough_dtype == "bf16" else tensor)
        return kept.pin_memory() if self.device == "cpu" and torch.cuda.is_available() else kept


NO_OFFLOAD = Offload()


@contextlib.contextmanager
def on_device(kept: Mapping[str, Tensor], like: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors on the device and in the dtype of ``like``; writes to them in the block are kept."""
    near = {name: tensor.to(like) for name, tensor in kept.items()}
    versions = {name: tensor._version for name, tensor in near.items()}
    yield near
    for name, tensor in near.items():
        if tensor is not kept[name] and tensor._version != versions[name]:
            kept[name].copy_(tensor)
