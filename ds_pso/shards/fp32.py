"""ZeRO 0 in fp32 with a plain torch optimizer: the parameters are the masters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.replicated import ReplicatedShards
from ds_pso.shards.saved import SavedWhole


class ParameterShards(ReplicatedShards):
    """Parts of the parameters themselves."""

    optimizer: torch.optim.Optimizer

    def _masters(self) -> Sequence[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        return [[param] for param in self._masters()]

    def _cast(self, masters: list[Tensor]) -> None:
        pass  # they are the same


class SavedParameters(SavedWhole):
    """The state of a torch optimizer; the parameters are saved with the model."""

    @classmethod
    def recognizes(cls, values: Mapping[str, object]) -> bool:
        return "param_groups" in values

    def masters(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return parameters


LAYOUT = ShardLayout(lambda: torch.optim.Optimizer, ParameterShards, SavedParameters)
