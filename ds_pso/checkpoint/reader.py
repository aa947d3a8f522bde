"""The files of one particle of a checkpoint, and where in them each element of its parameters lies. Knows no swarm.

Files are mapped into memory: what is not asked for is not read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ds_pso.checkpoint.format import RankRecord, particle_folders, rank_stem
from ds_pso.errors import CheckpointError
from ds_pso.shards import SavedOptimizer, Segment, saved_optimizer
from ds_pso.utils.wrappers import without_wrapper_parts

Value = TypeVar("Value")
_EXPERT = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")


@dataclass(frozen=True)
class SavedPiece:
    """A run of elements of a parameter: where it was saved, and where it lies in the parameter."""

    rank: int  # in the particle
    shard: int
    shard_start: int
    param_start: int
    numel: int


class ModelStates(TypedDict):
    """The part of DeepSpeed's ``*_model_states.pt`` that is used here."""

    module: dict[str, Tensor]
    optimizer: dict[str, object]  # at ZeRO 0; otherwise None
    param_shapes: list[dict[str, torch.Size]]
    shared_params: dict[str, str]
    frozen_param_shapes: dict[str, torch.Size] | None
    frozen_param_fragments: dict[str, Tensor] | None
    dp_world_size: int


class Flat(Protocol):
    """A flat tensor, or a part of a file that can be sliced like one."""

    def __getitem__(self, index: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class SavedParticle:
    """The files of one particle, mapped into memory.

    Names are those without the parts of wrappers such as torch.compile's, which DeepSpeed writes in some places and
    not in others; methods take both.

    Attributes:
        folder: DeepSpeed's.
        stage: of ZeRO.
        own: the safetensors of each rank.
        pieces: the runs of each parameter that is trained, in the order of the optimizer.
        model_states: DeepSpeed's, one of all ranks or at ZeRO 3 one of each.
    """

    folder: Path
    stage: int
    own: Sequence[safe_open]
    pieces: Mapping[str, list[SavedPiece]]
    model_states: Sequence[ModelStates]

    @classmethod
    def open(cls, source: Path, number: int, records: Sequence[RankRecord]) -> SavedParticle:
        """Open the files of particle ``number``.

        Args:
            records: of its ranks. Their files must have been checked: what is unpickled is trusted to be what was
                written.

        Raises:
            CheckpointError: a file is missing, or a pipeline engine has saved its layers one by one.
        """
        folders, size, stage = particle_folders(source, number), len(records), records[0]["zero_stage"]
        if any(folders.deepspeed.glob("layer_*-model_states.pt")):
            raise CheckpointError(
                f"{folders.deepspeed}: holds the layers of a pipeline engine, which only such an engine reads; resume "
                "with as many particles, ranks and stages as it was saved with, and use swarm.export"
            )
        pieces: dict[str, list[SavedPiece]] = {}
        for rank, record in enumerate(records):
            assert record["shards"] is not None
            for name, *numbers in record["shards"]["segments"]:
                pieces.setdefault(without_wrapper_parts(name), []).append(SavedPiece(rank, *numbers))
        if stage == 0 and len(list(folders.deepspeed.glob("expp_rank_*_optim_states.pt"))) > 1:
            raise CheckpointError(
                f"{folders.deepspeed}: under expert parallelism at ZeRO 0 each rank keeps a whole optimizer of other "
                "parameters, which is read on the ranks that saved it; load it there and use swarm.export, or train at "
                "ZeRO 1 or 2"
            )
        prefixes = [f"zero_pp_rank_{rank}_" for rank in range(size)] if stage == 3 else [""]
        return cls(
            folders.deepspeed,
            stage,
            [safe_open(f"{rank_stem(folders.part, number * size + rank)}.safetensors", "pt") for rank in range(size)],
            pieces,
            [_load(folders.deepspeed, f"{prefix}mp_rank_00_model_states.pt") for prefix in prefixes],
        )

    @property
    def size(self) -> int:
        """S, the number of its ranks."""
        return len(self.own)

    @functools.cached_property
    def module(self) -> dict[str, Tensor]:
        """The module's state; at ZeRO 3 of its parameters only the names and dtypes."""
        found = dict(self.model_states[0]["module"])
        for path in sorted(filter(is_of_expert, self.folder.iterdir())):  # DeepSpeed has left these out of the module
            found |= torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return _plain(found)

    @functools.cached_property
    def optimizers(self) -> list[SavedOptimizer]:
        """The saved state of each rank's optimizer; at ZeRO 0 it is the same one."""
        if self.stage == 0:
            return [saved_optimizer(self.model_states[0]["optimizer"])] * self.size
        names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(self.size)]
        return [saved_optimizer(_load(self.folder, name)["optimizer_state_dict"]) for name in names]

    @property
    def trains_other_weights(self) -> bool:
        """True if the masters are those that a schedule-free optimizer trains, and not those to evaluate."""
        values = self.optimizers[0].values
        places = [place for place in (values, *values.values()) if isinstance(place, dict)]
        groups = [group for place in places for group in place.get("param_groups", ())]
        # At ZeRO 3 the optimizer cannot reach the weights between steps, whatever its mode.
        return any(group.get("train_mode", False) or (self.stage == 3 and "train_mode" in group) for group in groups)

    def masters(self) -> list[list[Tensor]]:
        """Return the fp32 masters by rank and shard, as ``Shards.tensors`` were; padding at an end may be missing."""
        parameters = [self.module[name] for name in self.pieces]
        return [state.shards(rank, self.size, parameters) for rank, state in enumerate(self.optimizers)]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter."""
        name = without_wrapper_parts(name)
        return self.module[name].shape if self.stage < 3 else self._shapes[name]

    @functools.cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """The shapes of all parameters, at ZeRO 3."""
        groups = (*self.model_states[0]["param_shapes"], self.model_states[0]["frozen_param_shapes"] or {})
        return {name: torch.Size(shape) for group in groups for name, shape in _plain(group).items()}

    def numel(self, name: str) -> int:
        """Return the number of elements of a parameter that is trained."""
        return sum(piece.numel for piece in self.pieces[without_wrapper_parts(name)])

    def frozen(self, name: str) -> Tensor:
        """Return a parameter that is not trained, flat."""
        name = without_wrapper_parts(name)
        if self.stage < 3:
            return self.module[name].view(-1)
        blocks = [_plain(saved["frozen_param_fragments"] or {})[name] for saved in self.model_states]
        return torch.cat(blocks)[: self.shape(name).numel()]

    def frozen_and_tied(self, buffers: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return parameters that are not trained, in their working dtype; and names that share another tensor.

        Args:
            buffers: names of the module's state that are no parameters.
        """
        known = {*self.pieces, *buffers}
        others = [name for name, value in self.module.items() if name not in known and isinstance(value, Tensor)]
        if self.stage == 3:
            named = _plain(self.model_states[0]["shared_params"])
            shared = {name: without_wrapper_parts(source) for name, source in named.items()}
            names = _plain(self.model_states[0]["frozen_param_shapes"] or {})
            frozen = {name: self.frozen(name).view(self.shape(name)) for name in names}
        else:
            first: dict[int, str] = {}
            for name, tensor in self.module.items():
                if isinstance(tensor, Tensor) and tensor.numel():
                    first.setdefault(tensor.data_ptr(), name)
            shared = {name: first.get(self.module[name].data_ptr(), name) for name in others}
            frozen = {name: self.module[name].clone() for name in others if shared[name] == name}
        return frozen, {name: shared[name] for name in others if shared.get(name, name) != name}

    def gather(
        self, segments: Sequence[Segment], sizes: Sequence[int], dtype: torch.dtype, read: Callable[[int, int], Flat]
    ) -> list[Tensor]:
        """Return flat tensors of these sizes with the values that belong into ``segments``, and zeros elsewhere.

        Args:
            read: returns the values that a rank has saved for a shard.
        """
        tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
        for segment in segments:
            begin, end = segment.param_start, segment.param_start + segment.numel
            for piece in self.pieces[without_wrapper_parts(segment.name)]:
                start, stop = max(begin, piece.param_start), min(end, piece.param_start + piece.numel)
                if start < stop:
                    here, there = segment.shard_start - begin, piece.shard_start - piece.param_start
                    values = read(piece.rank, piece.shard)[start + there : stop + there]
                    tensors[segment.shard][start + here : stop + here] = values
        return tensors


def is_of_expert(path: Path) -> bool:
    """True for a file in which DeepSpeed keeps one expert of one layer, by its names in the whole model."""
    return _EXPERT.fullmatch(path.name) is not None


def _plain(values: Mapping[str, Value]) -> dict[str, Value]:
    return {without_wrapper_parts(name): value for name, value in values.items()}


def _load(folder: Path, pattern: str) -> Any:
    path = next(folder.glob(pattern), None)
    if path is None:
        raise CheckpointError(f"{folder / pattern}: missing; name another checkpoint with --tag")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
