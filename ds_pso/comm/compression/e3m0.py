"""The wire format ``e3m0``: a sign and a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import Format
from ds_pso.comm.compression.packing import pack, unpack
from ds_pso.comm.compression.registry import BLOCK

_SMALLEST = 6  # the exponent of the smallest power; the code above it is zero


class Powers(Format):
    """The nearest of s, s / 2, ..., s / 64 and 0, with s = max|x| of each block, and a sign: four bits.

    Source: FP4 in E3M0, in which A. Douillard et al., "Streaming DiLoCo with Overlapping Communication",
    arXiv 2501.18512, send pseudo-gradients; the scale of each block is ours.
    """

    def nbytes(self, numel: int) -> int:
        return numel // BLOCK * 4 + numel // 2

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        scales = encoded[: 4 * blocks].view(torch.float32).view(blocks, 1)
        return scales, encoded[4 * blocks :].view(blocks, BLOCK // 2)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        scales, numbers = codes  # (n, 1) fp32, (n, BLOCK / 2) uint8
        size = blocks.abs()
        scales.copy_(size.amax(1, keepdim=True))
        # Of a block of zeros, or of numbers at the end of fp32's range, nothing is sent.
        share = size.mul_(scales.reciprocal().nan_to_num_(0.0, 0.0, 0.0))
        exponents = torch.log2(1.5 / share).floor_().clamp_(0, _SMALLEST)  # the border lies at 3/4 of the larger power
        exponents[share < 2.0 ** -(_SMALLEST + 1)] = _SMALLEST + 1
        pack(exponents.to(torch.uint8) << 1 | (blocks < 0).to(torch.uint8), numbers)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        scales, numbers = codes
        found = unpack(numbers, 4)
        exponents = found >> 1
        powers = torch.exp2(-exponents.float()).masked_fill_(exponents > _SMALLEST, 0.0)
        torch.mul(torch.where((found & 1).bool(), -powers, powers), scales, out=blocks)


E3M0 = Powers()
