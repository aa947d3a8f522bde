"""ZeRO 0 in bf16 or fp16 with DeepSpeed's FP16_UnfusedOptimizer: one fp32 master per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from torch import Tensor

from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.replicated import ReplicatedShards
from ds_pso.shards.saved import SavedWhole


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


class SavedSplitMasters(SavedWhole):
    """One master per parameter, in lists by parameter group."""

    masters_key = "fp32_groups"

    @classmethod
    def recognizes(cls, values: Mapping[str, object]) -> bool:
        return cls.masters_key in values

    def masters(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return [master for group in cast("list[list[Tensor]]", self.values[self.masters_key]) for master in group]


def optimizer_class() -> type:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return FP16_UnfusedOptimizer


LAYOUT = ShardLayout(optimizer_class, SplitMasterShards, SavedSplitMasters)
