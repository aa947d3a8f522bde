"""DeepSpeed's checkpoint of one particle, as this rank of an engine with another partition would have saved it.

DeepSpeed's universal checkpoint (0.19.8) knows the moments of Adam alone, leaves frozen parameters as they are in the
engine, and unpickles whatever it finds. Here the records say where each element lies, so any optimizer whose state is
as large as its parameters will do, files are mapped into memory, and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CLIP_GRAD,
    FP32_FLAT_GROUPS,
    GROUP_PADDINGS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from ds_pso.checkpoint.reader import SavedParticle, masters_of
from ds_pso.errors import CheckpointError
from ds_pso.shards import Shards

# Of a ZeRO optimizer's state: what is the particle's, and not that of a partition.
_COMMON = (LOSS_SCALER, "dynamic_loss_scale", "overflow", CLIP_GRAD)


def check_same_model(saved: SavedParticle, engine: Any, shards: Shards) -> None:
    """Raises CheckpointError unless the engine trains the parameters that were saved, with such an optimizer."""
    reason = _difference(saved, engine, shards)
    if reason:
        raise _other_model(saved, reason)


def _difference(saved: SavedParticle, engine: Any, shards: Shards) -> str | None:
    foreign = saved.pieces.keys() ^ shards.trained_names()
    if foreign:
        return f"{min(foreign)} was trained there or is here, but not both"
    for name, parameter in engine.module.named_parameters():
        if name not in saved.module:
            return f"{name} was not saved"
        now = (tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.dtype)
        before = (tuple(saved.shape(name)), saved.module[name].dtype)
        if now != before:
            return f"{name} was saved as {before[1]} {list(before[0])}, and is {now[1]} {list(now[0])} now"
    theirs = saved.optimizer_states()[0] if saved.stage else saved.model_states[0]["optimizer"]
    if engine.optimizer.state_dict().keys() != theirs.keys():
        return f"its optimizer is not a {type(engine.optimizer).__name__} as configured now"
    return None


class Repartitioned:
    """What DeepSpeed shall find in its files.

    Attributes:
        model: the model states.
        optimizer: the optimizer's state.
    """

    def __init__(self, saved: SavedParticle, engine: Any, shards: Shards) -> None:
        """Reads all of it; the engine stays as it is.

        Raises:
            CheckpointError: other parameter groups, or the optimizer keeps something that cannot be divided.
        """
        self._saved, self._engine, self._shards = saved, engine, shards
        states = saved.optimizer_states()
        if engine.zero_elastic_checkpoint() or isinstance(states[0].get(BASE_OPTIMIZER_STATE), list):
            raise CheckpointError(
                f"{saved.folder}: zero_optimization.elastic_checkpoint = true keeps the optimizer's state in a form of "
                "its own; set it to false on the old ranks, save there, and resume from that"
            )
        self.model = self._model()
        self.optimizer = self._optimizer(states)

    def _model(self) -> dict[str, Any]:
        rank = self._engine.data_parallel_group.rank()
        model: dict[str, Any] = dict(self._saved.model_states[rank % len(self._saved.model_states)])
        model["dp_world_size"] = self._engine.seq_dp_world_size
        if self._saved.stage == 3 and model.get("frozen_param_fragments"):
            model["frozen_param_fragments"] = {
                name: self._block(name, parameter.ds_tensor.numel(), rank)
                for name, parameter in self._engine.module.named_parameters()
                if name in model["frozen_param_fragments"]
            }
        return model

    def _block(self, name: str, numel: int, rank: int) -> Tensor:
        """This rank's part of a parameter that is not trained; zeros behind its end."""
        whole = self._saved.frozen(name)
        part = whole[rank * numel : (rank + 1) * numel]
        return torch.cat([part, part.new_zeros(numel - part.numel())])

    def _optimizer(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The engine's own state, with what was saved in place of its values."""
        mine: dict[str, Any] = self._engine.optimizer.state_dict()
        self._check_groups(mine, states[0])
        mine |= {name: states[0][name] for name in _COMMON if name in states[0]}
        sizes = [tensor.numel() for tensor in self._shards.tensors]
        mine[_masters_name(mine)] = self._saved.gather(
            self._shards.segments, sizes, torch.float32, lambda rank, shard: masters_of(states[rank])[shard].detach()
        )
        base = _base(mine)
        base["state"] = self._moments(states, sizes, [_group_of(shard, mine) for shard in range(len(sizes))])
        base["param_groups"] = [
            {**theirs, "params": own["params"]} for own, theirs in zip(_groups(mine), _groups(states[0]), strict=True)
        ]
        return mine

    def _moments(self, states: list[dict[str, Any]], sizes: list[int], groups: list[int]) -> dict[int, dict[str, Any]]:
        """What the optimizer keeps for each shard. ``groups``: the parameter group of each."""
        saved = [_base(state)["state"] for state in states]
        found: dict[int, dict[str, Any]] = {}
        for shard, group in enumerate(groups):
            like = _groups(states[0])[group]["params"][0]
            for name, value in saved[0].get(like, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    self._check_size(name, value, like, states[0])
                else:  # a count of steps, equal on all ranks; each shard must have its own
                    value = copy.deepcopy(value)
                found.setdefault(shard, {})[name] = value
        for name in {name for state in found.values() for name in state}:
            divided = {k: s[name] for k, s in found.items() if isinstance(s.get(name), Tensor) and s[name].dim()}
            if not divided:
                continue

            def read(rank: int, shard: int, name: str = name) -> Tensor:
                values: Tensor = saved[rank][shard][name]
                return values

            segments = [s for s in self._shards.segments if s.shard in divided]
            parts = self._saved.gather(segments, sizes, next(iter(divided.values())).dtype, read)
            for shard in divided:
                found[shard][name] = parts[shard]
        return found

    def _check_groups(self, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        if len(_groups(mine)) != len(_groups(theirs)):
            raise _other_model(
                self._saved, f"its optimizer has {len(_groups(theirs))} parameter groups, and {len(_groups(mine))} now"
            )
        for segment in self._shards.segments:
            before = _group_of(self._saved.pieces[segment.name][0].shard, theirs)
            if _group_of(segment.shard, mine) != before:
                raise _other_model(self._saved, f"{segment.name} was in parameter group {before}, and now is not")

    def _check_size(self, name: str, value: Tensor, shard: int, state: Mapping[str, Any]) -> None:
        lean = masters_of(state)[shard].numel()
        paddings = state.get(GROUP_PADDINGS) or [0] * (shard + 1)
        if value.dim() > 1 or value.numel() not in (lean, lean + paddings[shard]):
            raise CheckpointError(
                f"{self._saved.folder}: its optimizer keeps {name} of shape {list(value.shape)} for {lean} elements, "
                "which cannot be divided anew; resume with the ranks per particle it was saved with"
            )

    @contextlib.contextmanager
    def in_place_of_the_files(self) -> Iterator[None]:
        """In the block ``engine.load_checkpoint`` of the folder that was saved loads this."""
        engine, reader = self._engine, self._engine.checkpoint_engine
        some_file = str(next(self._saved.folder.glob("*_model_states.pt")))
        engine.checkpoint_engine = _Reader(self)
        engine._get_all_ckpt_names = lambda *_: [some_file]  # a rank with a new number has none of its own
        try:
            yield
        finally:
            engine.checkpoint_engine = reader
            del engine._get_all_ckpt_names


class _Reader:
    """Stands where DeepSpeed has the object that reads its files."""

    def __init__(self, content: Repartitioned) -> None:
        self._content = content

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        if Path(path).name.endswith("_model_states.pt"):
            return self._content.model
        return {OPTIMIZER_STATE_DICT: self._content.optimizer}


def _other_model(saved: SavedParticle, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{saved.folder}: {reason}; build the model, precision and parameter groups it was saved with, or start "
        "without resuming"
    )


def _masters_name(state: Mapping[str, Any]) -> str:
    return FP32_FLAT_GROUPS if FP32_FLAT_GROUPS in state else SINGLE_PARTITION_OF_FP32_GROUPS


def _base(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ZeRO optimizer's state, that of the optimizer in it."""
    base: dict[str, Any] = state[OPTIMIZER_STATE_DICT if FP32_FLAT_GROUPS in state else BASE_OPTIMIZER_STATE]
    return base


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups; their "params" are numbers of shards."""
    groups: list[dict[str, Any]] = _base(state)["param_groups"]
    return groups


def _group_of(shard: int, state: Mapping[str, Any]) -> int:
    return next(number for number, group in enumerate(_groups(state)) if shard in group["params"])
