"""How numbers are written on the wire: formats that lose digits, and the memory that gives them back.

Knows tensors; knows nothing of peers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_pso.utils.chunks import in_chunks
from ds_pso.utils.offload import NO_OFFLOAD, Offload

BLOCK = 256  # elements that share a scale


class Format(ABC):
    """Writes fp32 numbers as bytes, in whole blocks; a few blocks at a time, whose passes stay in cache."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Bytes of ``numel`` elements, a multiple of ``BLOCK``."""

    @abstractmethod
    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        """The bytes of so many blocks, as tensors with a row for each."""

    @abstractmethod
    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        """(n, BLOCK) fp32 -> their codes."""

    @abstractmethod
    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        """Their codes -> (n, BLOCK) fp32."""

    def encode(self, values: Tensor, out: Tensor) -> None:
        """(numel,) fp32 -> (nbytes(numel),) uint8."""
        for blocks, *codes in self._parts(values, out):
            self._write(blocks, *codes)

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """(nbytes(numel),) uint8 -> (numel,) fp32."""
        for blocks, *codes in self._parts(out, encoded):
            self._read(blocks, *codes)

    def encode_and_subtract(self, values: Tensor, out: Tensor) -> None:
        """As ``encode``; of ``values`` remains what was rounded away."""
        for blocks, *codes in self._parts(values, out):
            self._write(blocks, *codes)
            rounded = torch.empty_like(blocks)
            self._read(rounded, *codes)
            blocks.sub_(rounded)

    def add_decoded(self, encoded: Tensor, values: Tensor) -> None:
        """``values`` += what ``decode`` gives."""
        for blocks, *codes in self._parts(values, encoded):
            more = torch.empty_like(blocks)
            self._read(more, *codes)
            blocks.add_(more)

    def _parts(self, values: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Some blocks and their codes at a time."""
        blocks = values.view(-1, BLOCK)
        return in_chunks(blocks, *self._codes(len(blocks), encoded), numel=BLOCK)


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
        scales, numbers = codes
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


FORMATS: dict[str, Format] = {"bf16": BFloat16(), "int8": Integers(8), "int4": Integers(4)}


class Differences:
    """What peers remember so that few digits are enough: they send how far they are from what all know.

    Attributes:
        common: what all peers know alike, like the tensors.
        residual: what rounding has kept from the others so far; it goes with the next message. In the
            sum over the peers nothing is ever lost.

    Source of the residual: error feedback, F. Seide et al., "1-Bit Stochastic Gradient Descent",
    Interspeech 2014; S. P. Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv 1901.09847.
    """

    def __init__(self, format: Format, tensors: Sequence[Tensor], offload: Offload = NO_OFFLOAD) -> None:
        """``tensors``: flat, fp32, and equal on all peers. ``offload`` may round the residual."""
        self.format = format
        self.common = [offload.keep(offload.near(t).clone()) for t in tensors]
        self.residual = [offload.keep(torch.zeros_like(t), rough=True) for t in self.common]

    def of(self, parts: Sequence[tuple[int, slice]]) -> Differences:
        """Those of parts of the tensors, live."""
        view = Differences(self.format, [])
        view.common = [self.common[i][part] for i, part in parts]
        view.residual = [self.residual[i][part] for i, part in parts]
        return view

    def agree_on(self, tensors: Sequence[Tensor]) -> None:
        """From now on these are what all peers know alike."""
        for common, tensor in zip(self.common, tensors, strict=True):
            common.copy_(tensor)
