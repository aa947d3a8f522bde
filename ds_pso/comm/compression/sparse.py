"""The wire format ``sparse``: the largest numbers of each chunk, in one or two bits each, and where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_pso.comm.compression.base import PartialFormat
from ds_pso.comm.compression.packing import pack, read_two_bits, unpack, write_in_two_bits
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
        mean = size.mean(1, keepdim=True)
        if self.options.bits == 2:
            write_in_two_bits(sent, size > mean, sizes, values)
        else:
            sizes.copy_(mean)
            pack((sent < 0).to(torch.uint8), values)

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
        if bits == 2:
            return where, read_two_bits(sizes, values)
        size = sizes.float().expand(where.shape)
        return where, torch.where(unpack(values, 1).bool(), -size, size)


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
