"""Shards of ZeRO 1 and 2, and of DeepSpeed's BF16_Optimizer (ZeRO 1 with fp32 accumulation)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_pso.shards.base import Segment, Shards, intersect


class Zero12Shards(Shards):
    """One flat partition per parameter group; parameters lie at known offsets, zeros between them."""

    def _masters(self, engine: Any) -> list[Tensor]:
        return list(engine.optimizer.single_partition_of_fp32_groups)

    def _find_segments(self) -> list[Segment]:
        segments = []
        optimizer = self.optimizer
        for shard, tensor in enumerate(self.tensors):
            rank = optimizer.real_dp_process_group[shard].rank()
            window = (rank * tensor.numel(), (rank + 1) * tensor.numel())
            params, offsets = optimizer.round_robin_bit16_groups[shard], optimizer.round_robin_bit16_offsets[shard]
            for param, offset in zip(params, offsets, strict=True):
                segments += intersect(self.name_of(param), offset, param.numel(), window, shard)
        return segments

    def _parameters(self) -> list[list[Tensor]]:
        return list(self.optimizer.round_robin_bit16_groups)

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class BF16Shards(Shards):
    """BF16_Optimizer: the same layout without padding between parameters."""

    def _masters(self, engine: Any) -> list[Tensor]:
        return list(engine.optimizer.fp32_groups_flat_partition)

    def _find_segments(self) -> list[Segment]:
        segments = []
        for shard, tensor in enumerate(self.tensors):
            rank = self.optimizer.real_dp_process_group[shard].rank()
            window = (rank * tensor.numel(), (rank + 1) * tensor.numel())
            offset = 0
            for param in self.optimizer.bf16_groups[shard]:
                segments += intersect(self.name_of(param), offset, param.numel(), window, shard)
                offset += param.numel()
        return segments

    def _parameters(self) -> list[list[Tensor]]:
        return list(self.optimizer.bf16_groups)

    def publish(self) -> None:
        self.optimizer.update_lp_params()
