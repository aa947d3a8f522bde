"""The wire format ``int2``: a sign, and one of two sizes that are means of what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import Format
from ds_pso.comm.compression.packing import read_two_bits, write_in_two_bits
from ds_pso.comm.compression.registry import BLOCK


class TwoBits(Format):
    """Sizes above the root mean square of a block are one group and the others another; each becomes its mean size.

    Source: the quantiser of A. Sarfi et al., "SparseLoCo", arXiv 2508.15706, which decodes a bin to the mean of what
    fell into it. For normal numbers the border lies within 2 % of that of the best quantiser of two bits (J. Max,
    "Quantizing for Minimum Distortion", 1960: 0.98 standard deviations).
    """

    def nbytes(self, numel: int) -> int:
        return numel // BLOCK * 4 + numel // 4

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        sizes = encoded[: 4 * blocks].view(torch.bfloat16).view(blocks, 2)
        return sizes, encoded[4 * blocks :].view(blocks, BLOCK // 4)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        sizes, numbers = codes  # (n, 2) bf16, (n, BLOCK / 4) uint8
        largest = blocks.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        scaled = blocks / largest  # squares of the numbers themselves may be beyond fp32
        border = scaled.square().mean(1, keepdim=True).sqrt_()
        write_in_two_bits(blocks, scaled.abs() > border, sizes, numbers)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        blocks.copy_(read_two_bits(*codes))


INT2 = TwoBits()
