"""RDA: a mean of movements that is as long as they are, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.local_group import LocalGroup
from ds_pso.shards import Segment, Shards
from ds_pso.utils.chunks import in_chunks


def matrices(shards: Shards) -> list[str]:
    """Return the names of the trained parameters of two or more dimensions, but for embeddings, in alphabetical order.

    Equal on all ranks.
    """
    layers = [module for module in shards.module.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    embeddings = {id(layer.weight) for layer in layers}
    trained = shards.trained_names()
    return sorted(
        p.name
        for p in shards.whole
        if p.name in trained and len(getattr(p.like, "ds_shape", p.like.shape)) >= 2 and id(p.like) not in embeddings
    )


class DirectionMean:
    """Gives each particle's movement of a matrix the length that they have on average, and their mean, too.

    With v_i the movement of particle i, and weights w_i that sum to one::

        merged = sum w_i |v_i|  *  d / |d|,    d = sum w_i v_i / |v_i|

    A plain mean of movements that are nearly at right angles to one another is sqrt(P) times shorter than each of
    them. Lengths are those of whole matrices, whatever the sharding: the ranks of a particle add up their parts.

    Source: the merge of "Decoupled DiLoCo", arXiv 2604.21428. Moves 8 bytes of each matrix and peer.

    Attributes:
        names: of the matrices, in the same order on all ranks. Of other parameters the mean is plain.
    """

    def __init__(
        self, exchange: Exchange, local: LocalGroup, segments: Sequence[Segment], names: Sequence[str]
    ) -> None:
        self.names = list(names)
        self._exchange = exchange
        self._local = local
        numbers = {name: number for number, name in enumerate(self.names)}
        self._places = [
            (numbers[s.name], s.shard, slice(s.shard_start, s.shard_start + s.numel))
            for s in segments
            if s.name in numbers
        ]

    def equalise(self, tensors: Sequence[Tensor], origin: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
        """Make this particle's movements as long as those of all are on average.

        Args:
            tensors: the shards, which are changed.
            origin: where all particles came from, like the shards.
            weights: of each particle, shape (P,), sum one; those of weight 0 may hold anything, NaN, too.

        Returns:
            The average length of each matrix's movements.
        """
        own = self._lengths(tensors, origin)
        table = self._exchange.all_gather(own)
        counted = [(weight, row) for weight, row in zip(weights, table, strict=True) if weight != 0]
        wanted = [sum(weight * row[k] for weight, row in counted) for k in range(len(own))]
        self._scale(tensors, origin, own, wanted)
        return wanted

    def stretch(self, tensors: Sequence[Tensor], origin: Sequence[Tensor], wanted: Sequence[float]) -> None:
        """Give each matrix's movement from ``origin`` the length that ``equalise`` returned."""
        self._scale(tensors, origin, self._lengths(tensors, origin), wanted)

    def _scale(
        self, tensors: Sequence[Tensor], origin: Sequence[Tensor], lengths: Sequence[float], wanted: Sequence[float]
    ) -> None:
        for number, shard, window in self._places:
            if not 0 < lengths[number] < math.inf:  # it has not moved, or has diverged and counts for nothing
                continue
            factor = wanted[number] / lengths[number]
            for x, start in in_chunks(tensors[shard][window], origin[shard][window]):
                start = start.to(x)
                x.sub_(start).mul_(factor).add_(start)

    def _lengths(self, tensors: Sequence[Tensor], origin: Sequence[Tensor]) -> list[float]:
        """Return how far each matrix is from its origin, over all ranks of the particle."""
        device = tensors[0].device if tensors else None
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        for number, shard, window in self._places:
            for x, start in in_chunks(tensors[shard][window], origin[shard][window]):
                moved = x - start.to(x)
                squares[number] += torch.dot(moved, moved).to(squares.device)  # which may be another
        rows = self._local.gather(squares.tolist())
        return [math.sqrt(sum(column)) for column in zip(*rows, strict=True)]
