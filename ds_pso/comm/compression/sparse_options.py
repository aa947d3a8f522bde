"""Options of the wire format ``sparse``; free of torch, so that a config can be checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_pso.utils.strict_model import StrictModel

CHUNK = 4096  # elements among which the largest are found: 64 x 64
_INDEX_BITS = 12
_UNIT = 8  # so many are sent at least, and a multiple of it, or bits would not fill bytes
_SIZES = {1: 2, 2: 4, 16: 0}  # bytes of the sizes of a chunk, by the bits of a value


class SparseOptions(StrictModel):
    """Options of the wire ``sparse``: the subsection ``swarm.sparse``."""

    density: float = Field(
        default=1 / 64,
        gt=0,
        le=0.5,
        description="Share of the elements that is sent: the largest of each 4,096, at least 8 and a multiple of 8.",
    )
    bits: Literal[1, 2, 16] = Field(
        default=2,
        description="Of each number that is sent: its sign, with one size or two sizes that are the means of the "
        "chunk's smaller and larger ones; or bf16.",
    )

    @property
    def kept(self) -> int:
        """Elements of each chunk that are sent."""
        return max(_UNIT, _UNIT * round(self.density * CHUNK / _UNIT))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.sizes_bytes + self.kept * (_INDEX_BITS + self.bits) // 8

    @property
    def sizes_bytes(self) -> int:
        """Bytes of the sizes of a chunk."""
        return _SIZES[self.bits]

    @property
    def bytes_per_element(self) -> float:
        """Bytes that an element takes, sent or not."""
        return self.chunk_bytes / CHUNK
