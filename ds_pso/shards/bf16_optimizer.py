"""DeepSpeed's BF16_Optimizer: ZeRO 1 with gradients accumulated in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ds_pso.shards.base import Segment, Shards, intersect
from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.saved import PartitionFormat


class _Optimizer(Protocol):
    """The part of ``BF16_Optimizer`` that is used here."""

    fp32_groups_flat_partition: list[Tensor]
    bf16_groups: list[list[Tensor]]
    real_dp_process_group: list[dist.ProcessGroup]

    def update_lp_params(self) -> None: ...


class BF16Shards(Shards):
    """One flat partition per parameter group, as at ZeRO 1, without padding between parameters."""

    optimizer: _Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return self.optimizer.fp32_groups_flat_partition

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

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return self.optimizer.bf16_groups

    def _publish_masters(self) -> None:
        self.optimizer.update_lp_params()


def optimizer_class() -> type:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return BF16_Optimizer


LAYOUT = ShardLayout(
    optimizer_class,
    BF16Shards,
    PartitionFormat(masters="single_partition_of_fp32_groups", base="base_optimizer_state", has_loss_scale=False),
)
