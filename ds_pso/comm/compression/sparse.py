"""The wire format ``sparse``: the largest numbers of each chunk, in one or two bits each, and where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import PartialFormat
from ds_pso.comm.compression.sparse_options import CHUNK, SparseOptions
from ds_pso.utils.chunks import in_chunks


class Sparse(PartialFormat):
    """The k largest of each chunk by size; 12 bits for the place of each, and its sign and a size.

    With two bits, sizes above the mean of the k are one group and the others another; what arrives is the sign times
    the mean of the group. With one bit all are one group.

    Source: A. Sarfi et al., "SparseLoCo: Communication-Efficient LLM Training", arXiv 2508.15706 (top-k in chunks of
    4,096, statistical quantiser of 2 bits); symmetric groups are ours.
    """

    block = CHUNK

    def __init__(self, options: SparseOptions) -> None:
        self.options = options
        self.kept = options.kept

    def nbytes(self, numel: int) -> int:
        return numel // CHUNK * self.options.chunk_bytes

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        parts = [self.options.sizes_bytes, self.kept * self.options.bits // 8, self.kept * 12 // 8]
        sizes, values, places = encoded.split([blocks * part for part in parts])
        sizes = sizes.view(torch.bfloat16).view(blocks, parts[0] // 2)
        return sizes, values.view(blocks, parts[1]), places.view(blocks, parts[2])

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        sizes, values, places = codes  # (n, 0 to 2) bf16, (n, kept bits / 8) uint8, (n, kept 12 / 8) uint8
        size, where = blocks.abs().topk(self.kept, dim=1, sorted=False)
        _pack_places(where, places)
        sent = blocks.gather(1, where)
        if self.options.bits == 16:
            values.view(torch.bfloat16).copy_(sent)
            return
        negative = (sent < 0).to(torch.uint8)
        if self.options.bits == 1:
            sizes.copy_(size.mean(1, keepdim=True))
            _pack(negative, values)
            return
        large = size > size.mean(1, keepdim=True)
        for column, group in enumerate((~large, large)):
            mean = torch.where(group, size, 0).sum(1).div_(group.sum(1).clamp_(min=1))
            sizes[:, column].copy_(mean)
        _pack(negative | large.to(torch.uint8) << 1, values)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        where, sent = self._sent(*codes)
        blocks.zero_().scatter_(1, where, sent)

    def add_sent(self, encoded: Tensor, weight: float, total: Tensor, weights: Tensor) -> None:
        blocks, others = total.view(-1, CHUNK), weights.view(-1, CHUNK)
        for part, count, *codes in in_chunks(blocks, others, *self._codes(len(blocks), encoded), numel=CHUNK):
            where, sent = self._sent(*codes)
            part.scatter_add_(1, where, sent.mul_(weight))
            count.scatter_add_(1, where, torch.full_like(sent, weight))

    def _sent(self, sizes: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places, (n, kept) int64, and what arrives there, (n, kept) fp32."""
        where, bits = _unpack_places(places), self.options.bits
        if bits == 16:
            return where, values.view(torch.bfloat16).float()
        codes = _unpack(values, bits)
        size = sizes.float()
        chosen = size.gather(1, (codes >> 1).long()) if bits == 2 else size.expand(codes.shape)
        return where, torch.where((codes & 1).bool(), -chosen, chosen)


def _pack(codes: Tensor, out: Tensor) -> None:
    """Write codes, (n, kept) uint8 of so many bits that they fill ``out``, (n, kept bits / 8), one behind the other."""
    per_byte = codes.shape[1] // out.shape[1]
    parts = codes.view(len(codes), per_byte, -1)
    out.copy_(parts[:, 0])
    for number in range(1, per_byte):
        out.bitwise_or_(parts[:, number] << number * (8 // per_byte))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``_pack``."""
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=1)


def _pack_places(where: Tensor, out: Tensor) -> None:
    """Write places, (n, kept) below 4,096, two of them into three bytes."""
    first, second = where.to(torch.int32).chunk(2, dim=1)
    words = (first | second << 12).contiguous()
    out.view(*words.shape, 3).copy_(words.view(torch.uint8).view(*words.shape, 4)[..., :3])


def _unpack_places(packed: Tensor) -> Tensor:
    """Undo ``_pack_places``."""
    low, middle, high = packed.view(len(packed), -1, 3).to(torch.int64).unbind(2)
    words = low | middle << 8 | high << 16
    return torch.cat([words & CHUNK - 1, words >> 12], dim=1)
