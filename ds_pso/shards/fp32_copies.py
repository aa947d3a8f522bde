"""fp32 copies of masters that DeepSpeed keeps in half precision: ``bf16_master_weights_and_grads`` and its like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class Fp32Copies:
    """Lets a sync work in fp32 where the masters are in half precision, and rounds what comes of it to them.

    The masters are what is trained and saved. A copy is made when a master is first asked for, and goes with the next
    optimizer step: so between syncs they take no memory. Masters of other types have no copy.
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}

    def of(self, masters: Sequence[Tensor]) -> list[Tensor]:
        """Return the copy of each master in half precision, and the others as they are, detached."""
        return [self._copy(i, master.detach()) for i, master in enumerate(masters)]

    def _copy(self, number: int, master: Tensor) -> Tensor:
        if master.dtype not in HALF:
            return master
        if number not in self._copies:
            self._copies[number] = master.float()
        return self._copies[number]

    def store(self, masters: Sequence[Tensor]) -> None:
        """Round the copies to the masters; the copies keep no more than these do."""
        for number, copy in self._copies.items():
            masters[number].detach().copy_(copy)
        self.refresh(masters)

    def refresh(self, masters: Sequence[Tensor]) -> None:
        """Let the copies that there are follow the masters."""
        for number, copy in self._copies.items():
            copy.copy_(masters[number].detach())

    def drop(self) -> None:
        """Forget the copies: the optimizer is about to change the masters."""
        self._copies.clear()
