"""ZeRO 1 and 2: one flat partition per parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ds_pso.shards.base import Segment, Shards, intersect
from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.saved import PartitionFormat


class _Optimizer(Protocol):
    """The part of ``DeepSpeedZeroOptimizer`` that is used here."""

    single_partition_of_fp32_groups: list[Tensor]
    round_robin_bit16_groups: list[list[Tensor]]
    round_robin_bit16_offsets: list[list[int]]
    real_dp_process_group: list[dist.ProcessGroup]

    def update_lp_params(self) -> None: ...


class Zero12Shards(Shards):
    """One flat partition per parameter group; parameters lie at known offsets, zeros between them."""

    optimizer: _Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

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

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return self.optimizer.round_robin_bit16_groups

    def _publish_masters(self) -> None:
        self.optimizer.update_lp_params()


def optimizer_class() -> type:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer


LAYOUT = ShardLayout(
    optimizer_class,
    Zero12Shards,
    PartitionFormat(masters="single_partition_of_fp32_groups", base="base_optimizer_state"),
)
