"""ZeRO 0 in fp32 with a plain torch optimizer: the parameters are the masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.replicated import ReplicatedShards
from ds_pso.shards.saved import WholeFormat


class ParameterShards(ReplicatedShards):
    """Parts of the parameters themselves."""

    optimizer: torch.optim.Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return [[param] for param in self._masters()]

    def _cast(self, masters: list[Tensor]) -> None:
        pass  # they are the same


LAYOUT = ShardLayout(lambda: torch.optim.Optimizer, ParameterShards, WholeFormat(masters=None))
