"""ZeRO 0 in bf16 or fp16 with DeepSpeed's FP16_Optimizer: one flat fp32 master per parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.replicated import ReplicatedShards
from ds_pso.shards.saved import WholeFormat


class _Optimizer(Protocol):
    """The part of ``FP16_Optimizer`` that is used here."""

    fp32_groups_flat: list[Tensor]
    fp16_groups: list[list[Tensor]]


class FlatMasterShards(ReplicatedShards):
    """Parts of one flat master per parameter group."""

    optimizer: _Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return self.optimizer.fp32_groups_flat

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return self.optimizer.fp16_groups

    def _cast(self, masters: list[Tensor]) -> None:
        for master, params in zip(masters, self._parameters(), strict=True):
            offset = 0
            for param in params:
                param.data.copy_(master[offset : offset + param.numel()].view_as(param))
                offset += param.numel()


def optimizer_class() -> type:
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    return FP16_Optimizer


LAYOUT = ShardLayout(optimizer_class, FlatMasterShards, WholeFormat(masters="fp32_groups_flat"))
