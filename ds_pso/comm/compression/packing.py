"""Codes of a few bits in bytes, and numbers of two bits: a sign, and one of two sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, out: Tensor) -> None:
    """Write codes, (n, k) uint8 of so many bits that they fill ``out``, (n, k bits / 8), one row behind the other."""
    per_byte = codes.shape[1] // out.shape[1]
    parts = codes.view(len(codes), per_byte, -1)
    out.copy_(parts[:, 0])
    for number in range(1, per_byte):
        out.bitwise_or_(parts[:, number] << number * (8 // per_byte))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack``: (n, k bits / 8) uint8 to (n, k)."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=1)


def write_in_two_bits(values: Tensor, large: Tensor, sizes: Tensor, codes: Tensor) -> None:
    """Write each value as its sign and one of two sizes: the mean size of its group in the row.

    Args:
        values: (n, k).
        large: (n, k) bool, the second group.
        sizes: (n, 2) bf16, written: the mean of either group, 0 of an empty one.
        codes: (n, k / 4) uint8, written.
    """
    size = values.abs()
    for column, group in enumerate((~large, large)):
        share = size / group.sum(1, keepdim=True).clamp_(min=1)  # before the sum, which may be beyond fp32
        sizes[:, column].copy_(torch.where(group, share, 0).sum(1))
    pack((values < 0).to(torch.uint8) | large.to(torch.uint8) << 1, codes)


def read_two_bits(sizes: Tensor, codes: Tensor) -> Tensor:
    """Undo ``write_in_two_bits``, (n, k) fp32."""
    numbers = unpack(codes, 2)
    chosen = sizes.float().gather(1, (numbers >> 1).long())
    return torch.where((numbers & 1).bool(), -chosen, chosen)
