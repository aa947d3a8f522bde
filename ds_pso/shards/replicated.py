"""Base of the layouts at ZeRO 0, where every rank of a particle holds the whole model.

The swarm still gives each rank one 1/S of it, so that S ranks share the traffic between the
particles as under ZeRO; publishing ends with the ranks of a particle sending each other their parts.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ds_pso.errors import UnsupportedError
from ds_pso.shards.base import Segment, Shards, equal_parts, intersect
from ds_pso.shards.engine import Engine


class ReplicatedShards(Shards):
    """Equal parts of whole masters. A subclass names these, the parameters that lie in them, and how they are cast."""

    def __init__(self, engine: Engine) -> None:
        self._group = engine.data_parallel_group
        self._rank = dist.get_rank(self._group)
        self._size = dist.get_world_size(self._group)
        super().__init__(engine)

    @functools.cached_property
    def _owned(self) -> list[list[tuple[int, int, int]]]:
        """The part of each rank: (master, start, stop)."""
        return equal_parts([master.numel() for master in self._masters()], self._size)

    @abstractmethod
    def _masters(self) -> Sequence[Tensor]:
        """Return those of the whole model."""

    def _flat_masters(self) -> list[Tensor]:
        masters = self._masters()
        for master in masters:
            if not master.data.is_contiguous():
                raise UnsupportedError(
                    f"a parameter of shape {tuple(master.shape)} is not contiguous in memory (channels_last?); "
                    "use ZeRO stage 1, which flattens parameters, or the contiguous memory format"
                )
        return [master.data.view(-1) for master in masters]

    @abstractmethod
    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        """Return those of each master, in the order in which they lie in it."""

    @property
    def tensors(self) -> list[Tensor]:
        masters = self._flat_masters()
        return [masters[m][start:stop] for m, start, stop in self._owned[self._rank]]

    def _find_segments(self) -> list[Segment]:
        segments, contents = [], self._parameters()
        for shard, (master, start, stop) in enumerate(self._owned[self._rank]):
            offset = 0
            for param in contents[master]:
                segments += intersect(self.name_of(param), offset, param.numel(), (start, stop), shard)
                offset += param.numel()
        return segments

    def publish(self) -> None:
        masters = self._flat_masters()
        self._share_with_local_ranks([[master] for master in masters])
        self._cast(masters)

    def moments(self) -> list[Tensor]:
        masters = self._masters()
        return [
            moment[start:stop]
            for m, start, stop in self._owned[self._rank]
            for moment in self._state.moments_of(masters[m])
        ]

    def publish_moments(self) -> None:
        self._share_with_local_ranks([self._state.moments_of(master) for master in self._masters()])

    def _share_with_local_ranks(self, flat: list[list[Tensor]]) -> None:
        """Each rank of the particle sends its own part of each master's tensors to the others."""
        if self._size == 1:
            return
        for rank, parts in enumerate(self._owned):
            source = dist.get_global_rank(self._group, rank)
            for master, start, stop in parts:
                for tensor in flat[master]:
                    dist.broadcast(tensor[start:stop], source, group=self._group)

    @abstractmethod
    def _cast(self, masters: list[Tensor]) -> None:
        """Bring the working weights in line with the masters."""
