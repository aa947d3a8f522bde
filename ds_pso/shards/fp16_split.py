"""ZeRO 0 in bf16 or fp16 with DeepSpeed's FP16_UnfusedOptimizer: one fp32 master per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.replicated import ReplicatedShards
from ds_pso.shards.saved import WholeFormat


class _Optimizer(Protocol):
    """The part of ``FP16_UnfusedOptimizer`` that is used here."""

    fp32_groups: list[list[Tensor]]
    fp16_groups: list[list[Tensor]]


class SplitMasterShards(ReplicatedShards):
    """Parts of one master per parameter."""

    optimizer: _Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return [master for group in self.optimizer.fp32_groups for master in group]

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return [[param] for group in self.optimizer.fp16_groups for param in group]

    def _cast(self, masters: list[Tensor]) -> None:
        for master, (param,) in zip(masters, self._parameters(), strict=True):
            param.data.copy_(master.view_as(param))


def optimizer_class() -> type:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return FP16_UnfusedOptimizer


LAYOUT = ShardLayout(optimizer_class, SplitMasterShards, WholeFormat(masters="fp32_groups"))
