"""Checksums of tensors that travel: compared between all peers before any element is used.

Knows tensors; knows nothing of process groups.
"""

from __future__ import annotations

import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_pso.utils.chunks import in_chunks

TRIES = 3  # of a collective
_ROUNDING = 2.0**-24  # of fp32, relative


def checksum(tensor: Tensor) -> int:
    """Return the sum of the tensor's bytes, taken 8 at a time as whole numbers that wrap around at 2^64; as int64.

    Every single flipped bit changes it, and of other damage all but one in about 2^64; not the order of whole words.
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole], raw[whole:]
    if words.storage_offset() % 8:
        words = words.clone()
    last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
    last[: rest.numel()] = rest
    return int(words.view(torch.int64).sum() + last.view(torch.int64).sum())


def sealed(row: Sequence[int]) -> list[int]:
    """Return the row with a CRC-32 of it behind."""
    return [*row, _seal(row)]


def unsealed(row: Sequence[int]) -> list[int] | None:
    """Return the row that ``sealed`` was given; None if it is damaged."""
    *inside, seal = row
    return inside if seal == _seal(inside) else None


def _seal(row: Sequence[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(row)}q", *row))


class Moved(ABC):
    """The tensors that a collective has moved, as one peer sees them."""

    @abstractmethod
    def row(self) -> list[int]:
        """Return this peer's checksums, for all others: int64, of equal length on all."""

    @abstractmethod
    def damage(self, rows: Sequence[Sequence[int]]) -> str:
        """Return a description of the damage that the rows of all peers show; empty if there is none. Equal on all."""


@dataclass
class Copied(Moved):
    """Tensors that must arrive as they are.

    Attributes:
        sent: to each peer; None: nothing.
        arrived: from each peer.
    """

    sent: Sequence[Tensor | None]
    arrived: Sequence[Tensor | None]

    def row(self) -> list[int]:
        sums: dict[int, int] = {}  # one tensor may go to all
        for tensor in (*self.sent, *self.arrived):
            if tensor is not None and id(tensor) not in sums:
                sums[id(tensor)] = checksum(tensor)
        return [0 if tensor is None else sums[id(tensor)] for tensor in (*self.sent, *self.arrived)]

    def damage(self, rows: Sequence[Sequence[int]]) -> str:
        peers = range(len(rows))
        pairs = [(i, j) for i in peers for j in peers if i != j and rows[i][j] != rows[j][len(rows) + i]]
        return ", ".join(f"what particle {i} sent to particle {j}" for i, j in pairs)


@dataclass
class Added(Moved):
    """A tensor that becomes the sum of all peers' tensors, in place: equal bits, and the sum of what was sent.

    Made before the sum is. The sum of the result's elements must be that of all tensors' elements, up to rounding: of
    P numbers at most (P - 1) 2^-24 times the sum of their absolute values. So damage on the way that changes the
    total by less is seen only if not all peers got it.
    """

    tensor: Tensor
    total: float = field(init=False)
    size: float = field(init=False)  # sum of the absolute values

    def __post_init__(self) -> None:
        self.total, self.size = _total(self.tensor), _size(self.tensor)

    def row(self) -> list[int]:
        return [checksum(self.tensor), *map(_bits, (self.total, self.size, _total(self.tensor)))]

    def damage(self, rows: Sequence[Sequence[int]]) -> str:
        if len({row[0] for row in rows}) > 1:
            return "the sum, which is not the same everywhere"
        total, size = (sum(_from_bits(row[k]) for row in rows) for k in (1, 2))
        error = abs(_from_bits(rows[0][3]) - total)
        # What is not finite was so before it was sent.
        if math.isfinite(size) and not error <= len(rows) * _ROUNDING * size:
            return "the sum, which is not that of what was sent"
        return ""


def _total(tensor: Tensor) -> float:
    return float(sum(part.sum(dtype=torch.float64) for (part,) in in_chunks(tensor)))


def _size(tensor: Tensor) -> float:
    return float(sum(torch.linalg.vector_norm(part, ord=1).double() for (part,) in in_chunks(tensor)))


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
