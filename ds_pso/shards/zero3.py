"""ZeRO 3: each rank holds one block of every parameter, grouped into sub-groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from ds_pso.shards.base import Segment, Shards
from ds_pso.shards.engine import Engine
from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.nvme import NvmeOffload
from ds_pso.shards.partial_offload import second_optimizer
from ds_pso.shards.saved import PartitionFormat


class _Parameter(Protocol):
    ds_numel: int

    def partition_numel(self) -> int: ...


class _Optimizer(Protocol):
    """The part of ``DeepSpeedZeroOptimizer_Stage3`` that is used here."""

    fp32_partitioned_groups_flat: list[Tensor]
    fp16_partitioned_groups_flat_numel: list[int]
    fp16_groups: list[list[_Parameter]]
    dp_process_group: dist.ProcessGroup
    sub_group_to_group_id: dict[int, int]
    state: dict[Tensor, dict[str, Tensor]]

    def _set_fp32_optimizer_param_groups(self) -> None: ...
    def _clear_fp32_optimizer_param_groups(self) -> None: ...
    def checkpoint_event_prologue(self) -> None: ...
    def checkpoint_event_epilogue(self) -> None: ...
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


class Zero3Shards(Shards):
    """One flat tensor per sub-group: the rank's block of each parameter, one after another.

    A parameter of n elements is cut into S blocks of ceil(n / S); the last blocks end in padding
    that DeepSpeed leaves uninitialised.
    """

    optimizer: _Optimizer

    def __init__(self, engine: Engine) -> None:
        self._nvme = NvmeOffload.of(engine.optimizer)
        super().__init__(engine)

    def _optimizers(self) -> list[Any]:
        second = second_optimizer(self.optimizer)
        return [self.optimizer] if second is None else [self.optimizer, second]

    def _masters(self) -> Sequence[Tensor]:
        assert self._nvme is None or self._nvme.is_mapped, "what lies on NVMe is read in a block of mapped()"
        return self.optimizer.fp32_partitioned_groups_flat

    @property
    def numels(self) -> list[int]:
        return [int(numel) for numel in self.optimizer.fp16_partitioned_groups_flat_numel]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        if not self.is_schedule_free:
            yield
            return
        # Outside of a step DeepSpeed leaves the optimizer's groups empty, so that a script's eval() changes no weights.
        inner: Any = self._states[0].inner
        in_eval_mode = self._states[0].is_in_eval_mode
        if in_eval_mode:
            inner.train()
        self.optimizer._set_fp32_optimizer_param_groups()
        try:
            with super().evaluating():
                yield
        finally:
            self.optimizer._clear_fp32_optimizer_param_groups()
            if in_eval_mode:
                inner.eval()

    def mapped(self, *, writes: bool = True) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._nvme is None else self._nvme.mapped(writes=writes)

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

    def _parameters(self) -> Sequence[Sequence[object]]:
        return self.optimizer.fp16_groups

    def _decays_of(self, number: int) -> dict[str, float]:
        # Outside of a step the groups are empty.
        state, group = self._states[0], self.optimizer.sub_group_to_group_id[number]
        return state.decays(state.groups[group], self._moments_of(self._masters()[number]))

    def reset_optimizer_state(self) -> None:
        super().reset_optimizer_state()
        for momentum in self._muon_momenta().values():
            momentum.zero_()

    def reloaded(self) -> None:
        super().reloaded()
        # DeepSpeed loads copies into the optimizer's state, and goes on with what it has here.
        for group, momentum in self._muon_momenta().items():
            state = self.optimizer.state.get(self.optimizer.fp32_partitioned_groups_flat[group], {})
            loaded = state.get("momentum_buffer")
            if loaded is not None and loaded is not momentum:
                momentum.copy_(loaded)
                state["momentum_buffer"] = momentum

    def _muon_momenta(self) -> dict[int, Tensor]:
        """Return what ``save_muon_momentum_buffer_in_memory`` keeps outside of the optimizer's state, by sub-group."""
        return getattr(self.optimizer, "muon_momentum_buffer_partitioned_groups_flat", {})

    def _publish_masters(self) -> None:
        optimizer = self.optimizer
        optimizer.checkpoint_event_prologue()  # lets go of gathered (persistent) parameters
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers them anew, and drops hpZ's secondary copies


def optimizer_class() -> type:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return DeepSpeedZeroOptimizer_Stage3


LAYOUT = ShardLayout(
    optimizer_class, Zero3Shards, PartitionFormat(masters="fp32_flat_groups", base="optimizer_state_dict")
)
