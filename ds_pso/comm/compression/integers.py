"""The wire formats ``int8`` and ``int4``: a scale for each block, and small whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import Format
from ds_pso.comm.compression.registry import BLOCK


class Integers(Format):
    """s round(x / s) with s = max|x| / levels in each block: fp32 scales, then whole numbers of ``bits``.

    Source: block-wise quantisation as in T. Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", arXiv 2110.02861, with evenly spaced levels.
    """

    def __init__(self, bits: int) -> None:
        self.per_byte = 8 // bits
        self.levels = 2 ** (bits - 1) - 1

    def nbytes(self, numel: int) -> int:
        return numel // BLOCK * 4 + numel // self.per_byte

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        scales = encoded[: 4 * blocks].view(torch.float32).view(blocks, 1)
        return scales, encoded[4 * blocks :].view(blocks, BLOCK // self.per_byte)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        scales, numbers = codes  # (n, 1) fp32, (n, BLOCK / per_byte) uint8
        scales.copy_(blocks.abs().amax(1, keepdim=True)).div_(self.levels)
        # Of a block of zeros, or of numbers so small that the scale is one of the last denormals, nothing is sent.
        steps = scales.reciprocal().nan_to_num_(0.0, 0.0, 0.0)
        rounded = (blocks * steps).round_().clamp_(-self.levels, self.levels)
        if self.per_byte == 1:
            numbers.view(torch.int8).copy_(rounded)
        else:
            # By way of int8, which torch converts to and from several times as fast as uint8.
            halves = rounded.add_(8).to(torch.int8).view(torch.uint8).view(len(blocks), 2, BLOCK // 2)
            torch.add(halves[:, 0], halves[:, 1], alpha=16, out=numbers)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        scales, numbers = codes
        if self.per_byte == 1:
            blocks.copy_(numbers.view(torch.int8))
        else:
            halves = blocks.view(len(blocks), 2, BLOCK // 2)
            halves[:, 0].copy_((numbers & 15).view(torch.int8))
            halves[:, 1].copy_((numbers >> 4).view(torch.int8))
            blocks.sub_(8)
        blocks.mul_(scales)


INT8, INT4 = Integers(8), Integers(4)
