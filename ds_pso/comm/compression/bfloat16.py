"""The wire format ``bf16``: the upper half of each number."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import Format
from ds_pso.comm.compression.registry import BLOCK


class BFloat16(Format):
    """The upper half of each number, rounded to nearest."""

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        return (encoded.view(torch.bfloat16).view(blocks, BLOCK),)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        codes[0].copy_(blocks)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        blocks.copy_(codes[0])


BF16 = BFloat16()
