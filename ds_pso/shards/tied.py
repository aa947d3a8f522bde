"""Weights that several stages of a pipeline hold: after a sync all have those of the first of these stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_pso.shards.engine import Engine, is_pipeline

if TYPE_CHECKING:
    from ds_pso.shards.base import Segment


class TiedWeights:
    """Keeps the copies of a tied weight equal.

    Each stage trains a copy of its own with the sum of all gradients, so the copies begin and stay equal. A sync would
    let them go apart: a wire rounds in blocks, which lie differently in each stage, and fragments are cut by stage.

    Args:
        name_of: the name of a parameter, as in ``module.named_parameters()``.
        trained: names of the parameters that are trained.
    """

    def __init__(self, engine: Engine, name_of: Callable[[nn.Parameter], str], trained: set[str]) -> None:
        self._engine = engine
        tied = engine.module.get_tied_weights_and_groups() if is_pipeline(engine) else []  # type: ignore[operator]
        named = [(name_of(weight), weight.numel(), group) for weight, group in tied]
        self._tied = [(name, numel, group) for name, numel, group in named if name in trained]

    def equalise(self, tensors: Sequence[Tensor], segments: Sequence[Segment]) -> None:
        """Copy those of the first stage to the others. Called on all ranks of the particle.

        Args:
            tensors: the shards, in which the copies lie, each with a part on every data-parallel rank of its stage.
        """
        for name, numel, stages in self._tied:  # in the same order on all ranks that share one
            places = [
                (
                    tensors[s.shard][s.shard_start : s.shard_start + s.numel],
                    slice(s.param_start, s.param_start + s.numel),
                )
                for s in segments
                if s.name == name
            ]
            whole = torch.zeros(numel, device=self._engine.device)
            for part, place in places:
                whole[place].copy_(part)
            # An element is zero on all ranks of the stage but its owner.
            dist.all_reduce(whole, group=self._engine.seq_data_parallel_group)
            dist.broadcast(whole, dist.get_global_rank(stages, 0), group=stages)
            for part, place in places:
                part.copy_(whole[place])
