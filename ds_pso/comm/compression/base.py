"""The interface of a wire format, and the differences that travel in one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ds_pso.comm.compression.registry import BLOCK
from ds_pso.utils.chunks import in_chunks
from ds_pso.utils.offload import NO_OFFLOAD, Offload


class Format(ABC):
    """A way to write fp32 numbers as bytes: whole blocks, a few at a time, so that all passes over them stay in cache.

    A new format is a subclass in a file of this folder, an instance of it, and a line in ``registry.py``.

    Attributes:
        block: elements that are written together; every format writes whole blocks.
    """

    block: ClassVar[int] = BLOCK

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Return the bytes that ``numel`` elements take; ``numel`` is a multiple of ``block``."""

    @abstractmethod
    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        """Return views of the bytes of so many blocks, such as scales and numbers, each with a row per block."""

    @abstractmethod
    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        """Write blocks, (n, block) fp32, into their codes."""

    @abstractmethod
    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        """Read blocks, (n, block) fp32, from their codes."""

    def encode(self, values: Tensor, out: Tensor) -> None:
        """Write ``values``, (numel,) fp32, into ``out``, (nbytes(numel),) uint8."""
        for blocks, *codes in self._parts(values, out):
            self._write(blocks, *codes)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Read ``encoded``, (nbytes(numel),) uint8, into ``out``, (numel,) fp32."""
        for blocks, *codes in self._parts(out, encoded):
            self._read(blocks, *codes)

    def encode_and_subtract(self, values: Tensor, out: Tensor) -> None:
        """Encode ``values``, and leave in them what rounding took away."""
        for blocks, *codes in self._parts(values, out):
            self._write(blocks, *codes)
            rounded = torch.empty_like(blocks)
            self._read(rounded, *codes)
            blocks.sub_(rounded)

    def add_decoded(self, encoded: Tensor, values: Tensor) -> None:
        """Decode, and add the result to ``values``."""
        for blocks, *codes in self._parts(values, encoded):
            more = torch.empty_like(blocks)
            self._read(more, *codes)
            blocks.add_(more)

    def _parts(self, values: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield some blocks and their codes at a time."""
        blocks = values.view(-1, self.block)
        return in_chunks(blocks, *self._codes(len(blocks), encoded), numel=self.block)


class PartialFormat(Format):
    """A format that writes some of the numbers, and of the others nothing: not even zero.

    So a mean is taken, element by element, over those who have sent it. Each peer hears from every other one.
    """

    @abstractmethod
    def add_sent(self, encoded: Tensor, weight: float, total: Tensor, weights: Tensor) -> None:
        """Add the numbers that were sent to ``total``, times ``weight``, and that to the same elements of ``weights``.

        Args:
            encoded: (nbytes(numel),) uint8.
            weight: of the peer who has sent them.
            total: (numel,) fp32.
            weights: (numel,) fp32.
        """


class Differences:
    """State that makes few digits enough: peers send their distance to values that all of them have.

    What is not sent waits for the next message, in one of two places. Either in a tensor of its own, and the weights
    go where the message said. Or in the weights of the particle itself: they go there and keep, on top, what could not
    be said, so that the next difference has it in any case, and training goes on from where it was.

    Attributes:
        format: how a difference is written.
        common: values that are the same on all peers, shaped like the tensors.
        residual: error-feedback residual: what has been withheld so far. In the sum over the peers nothing is ever
            lost. Empty if it is in the weights.
        decay: the residual is multiplied by it before it is sent.
        from_zero: the tensors themselves travel; ``common`` is zero, and takes no memory.
        rest: of a residual in the weights: what belongs to the piece that has just arrived, like it.

    Source of the residual: error feedback, F. Seide et al., "1-Bit Stochastic Gradient Descent",
    Interspeech 2014; S. P. Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv 1901.09847.
    """

    def __init__(
        self,
        format: Format,
        tensors: Sequence[Tensor],
        offload: Offload = NO_OFFLOAD,
        *,
        in_weights: bool = False,
        decay: float = 1.0,
    ) -> None:
        """Start from tensors that are equal on all peers.

        Args:
            format: how a difference is written.
            tensors: flat, fp32.
            offload: where the state lies; may round the residual.
            in_weights: where the residual lies.
            decay: of a residual in a tensor of its own.
        """
        self.format = format
        self.common = [offload.keep(offload.near(t).clone()) for t in tensors]
        self.in_weights = in_weights
        self.residual = [] if in_weights else [offload.keep(torch.zeros_like(t), rough=True) for t in self.common]
        self.decay = decay
        self.from_zero = False
        self.rest: Tensor | None = None

    @classmethod
    def to_zero(cls, format: Format, tensors: Sequence[Tensor], offload: Offload = NO_OFFLOAD) -> Differences:
        """Return state for what is far from what it was at the last message: the residual alone.

        Args:
            format: how a tensor is written.
            tensors: flat, of any floating dtype.
            offload: where the residual lies; may round it.
        """
        made = cls(format, [], offload)
        made.from_zero = True
        made.common = [torch.zeros(1, device=t.device).expand(t.numel()) for t in tensors]
        made.residual = [
            offload.keep(offload.near(torch.zeros(t.numel(), device=t.device)), rough=True) for t in tensors
        ]
        return made

    def of(self, parts: Sequence[tuple[int, slice]]) -> Differences:
        """Return the state of parts of the tensors, as views.

        Args:
            parts: index of a tensor, and a slice of it.
        """
        view = Differences(self.format, [], in_weights=self.in_weights, decay=self.decay)
        view.common = [self.common[i][part] for i, part in parts]
        view.residual = [self.residual[i][part] for i, part in parts] if self.residual else []
        return view

    def agree_on(self, tensors: Sequence[Tensor]) -> None:
        """Make these the common values; the residual stays."""
        for common, tensor in zip(self.common, tensors, strict=True):
            common.copy_(tensor)
