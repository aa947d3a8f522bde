"""Shards at ZeRO 0, where every rank of a particle holds the whole model.

The swarm still gives each rank one 1/S of it, so that S ranks share the traffic between the
particles as under ZeRO; publishing ends with the ranks of a particle telling each other their parts.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_pso.errors import UnsupportedError
from ds_pso.shards.base import Segment, Shards, intersect


class ReplicatedShards(Shards):
    """Base of the stage 0 cases. A subclass names the full masters and what lies in them."""

    def __init__(self, engine: Any) -> None:
        self._group = engine.data_parallel_group
        self._rank = dist.get_rank(self._group)
        self._size = dist.get_world_size(self._group)
        self._owned = equal_parts([m.numel() for m in self._masters(engine)], self._size)
        super().__init__(engine)

    def _masters(self, engine: Any) -> list[Tensor]:
        """Of the whole model; here, the parameters themselves (pure fp32)."""
        return [param for group in engine.optimizer.param_groups for param in group["params"]]

    def _flat_masters(self) -> list[Tensor]:
        masters = self._masters(self.engine)
        for master in masters:
            if not master.data.is_contiguous():
                raise UnsupportedError(
                    f"a parameter of shape {tuple(master.shape)} is not contiguous in memory (channels_last?); "
                    "use ZeRO stage 1, which flattens parameters, or the contiguous memory format"
                )
        return [master.data.view(-1) for master in masters]

    def _parameters(self) -> list[list[Tensor]]:
        """Those of each master, in the order in which they lie in it."""
        return [[param] for group in self.optimizer.param_groups for param in group["params"]]

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
        masters = self._masters(self.engine)
        return [
            moment[start:stop] for m, start, stop in self._owned[self._rank] for moment in self._moments_of(masters[m])
        ]

    def publish_moments(self) -> None:
        self._share_with_local_ranks([self._moments_of(master) for master in self._masters(self.engine)])

    def _share_with_local_ranks(self, flat: list[list[Tensor]]) -> None:
        """Each rank of the particle sends its own part of each master's tensors to the others."""
        if self._size == 1:
            return
        for rank, parts in enumerate(self._owned):
            source = dist.get_global_rank(self._group, rank)
            for master, start, stop in parts:
                for tensor in flat[master]:
                    dist.broadcast(tensor[start:stop], source, group=self._group)

    def _cast(self, masters: list[Tensor]) -> None:
        """Bring the working weights in line with the masters; in pure fp32 they are the same."""


class FlatMasterShards(ReplicatedShards):
    """bf16 or fp16 with FP16_Optimizer: one flat fp32 master per parameter group."""

    def _masters(self, engine: Any) -> list[Tensor]:
        return list(engine.optimizer.fp32_groups_flat)

    def _parameters(self) -> list[list[Tensor]]:
        return [list(group) for group in self.optimizer.fp16_groups]

    def _cast(self, masters: list[Tensor]) -> None:
        for master, params in zip(masters, self._parameters(), strict=True):
            offset = 0
            for param in params:
                param.data.copy_(master[offset : offset + param.numel()].view_as(param))
                offset += param.numel()


class SplitMasterShards(ReplicatedShards):
    """bf16 or fp16 with FP16_UnfusedOptimizer: one fp32 master per parameter."""

    def _masters(self, engine: Any) -> list[Tensor]:
        return [master for group in engine.optimizer.fp32_groups for master in group]

    def _parameters(self) -> list[list[Tensor]]:
        return [[param] for group in self.optimizer.fp16_groups for param in group]

    def _cast(self, masters: list[Tensor]) -> None:
        for master, (param,) in zip(masters, self._parameters(), strict=True):
            param.data.copy_(master.view_as(param))


def equal_parts(numels: list[int], parts: int) -> list[list[tuple[int, int, int]]]:
    """Cut tensors of these sizes into ``parts`` runs of nearly equal length: (tensor, start, stop)."""
    total = sum(numels)
    cut: list[list[tuple[int, int, int]]] = []
    for part in range(parts):
        begin, end = total * part // parts, total * (part + 1) // parts
        pieces, offset = [], 0
        for index, numel in enumerate(numels):
            start, stop = max(begin, offset), min(end, offset + numel)
            if start < stop:
                pieces.append((index, start - offset, stop - offset))
            offset += numel
        cut.append(pieces)
    return cut
