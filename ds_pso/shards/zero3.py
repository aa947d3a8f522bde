"""Shards of ZeRO 3: each rank holds one block of every parameter, grouped into sub-groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_pso.shards.base import Segment, Shards


class Zero3Shards(Shards):
    """One flat tensor per sub-group: the rank's block of each parameter, one after another.

    A parameter of n elements is cut into S blocks of ceil(n / S); the last blocks end in padding
    that DeepSpeed leaves uninitialised.
    """

    def _masters(self, engine: Any) -> list[Tensor]:
        return list(engine.optimizer.fp32_partitioned_groups_flat)

    def _find_segments(self) -> list[Segment]:
        segments = []
        rank = self.optimizer.dp_process_group.rank()
        for shard, params in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for param in params:
                block = param.partition_numel()
                start = rank * block
                numel = min(block, max(0, param.ds_numel - start))
                if numel:
                    segments.append(Segment(self.name_of(param), shard, offset, start, numel))
                offset += block
        return segments

    def _parameters(self) -> list[list[Tensor]]:
        return list(self.optimizer.fp16_groups)

    def publish(self) -> None:
        optimizer = self.optimizer
        optimizer.checkpoint_event_prologue()  # lets go of gathered (persistent) parameters
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers them anew, and drops hpZ's secondary copies
