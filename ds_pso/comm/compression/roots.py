"""Numbers that are never negative, written as their square roots in another format."""

from __future__ import annotations

from torch import Tensor

from ds_pso.comm.compression.base import Format


class Roots(Format):
    """Q(sqrt(x))^2, block by block: sums of what arrives are sums of squares, and never negative.

    An optimizer divides by the root of such a number, so it is that which must be right: a block of 256 spans twice as
    many powers of ten as in the format itself. A negative number, which a residual can lead to, is written as zero.

    Args:
        form: writes the roots.
    """

    def __init__(self, form: Format) -> None:
        self._form = form

    def nbytes(self, numel: int) -> int:
        return self._form.nbytes(numel)

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        return self._form._codes(blocks, encoded)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        self._form._write(blocks.clamp(min=0).sqrt_(), *codes)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        self._form._read(blocks, *codes)
        blocks.square_()
