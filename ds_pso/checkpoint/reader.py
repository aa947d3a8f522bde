"""The files of one particle of a checkpoint, and where in them each element of its parameters lies. Knows no swarm.

Files are mapped into memory: what is not asked for is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS
from safetensors import safe_open
from torch import Tensor

from ds_pso.checkpoint.format import DEEPSPEED_TAG, rank_stem
from ds_pso.errors import CheckpointError
from ds_pso.shards import Segment


@dataclass(frozen=True)
class Piece:
    """A run of elements of a parameter: where it was saved, and where it lies in the parameter."""

    rank: int  # in the particle
    shard: int
    shard_start: int
    param_start: int
    numel: int


class SavedParticle:
    """Give it records whose files have been checked: what is unpickled here is trusted to be what was written.

    Attributes:
        own: of each rank its safetensors.
        pieces: of each parameter that is trained.
        module: DeepSpeed's; at stage 3 only buffers, names and dtypes.
    """

    def __init__(self, source: Path, number: int, records: Sequence[Mapping[str, Any]]) -> None:
        """``records``: of its ranks."""
        self.folder = source / f"particle_{number}" / DEEPSPEED_TAG
        self.size = len(records)
        self.stage: int = records[0]["zero_stage"]
        first = number * self.size
        self.own = [safe_open(f"{rank_stem(source, first + rank)}.safetensors", "pt") for rank in range(self.size)]
        self.pieces: dict[str, list[Piece]] = {}
        for rank, record in enumerate(records):
            for name, *numbers in record["shards"]["segments"]:
                self.pieces.setdefault(name, []).append(Piece(rank, *numbers))
        self.numel = {name: sum(piece.numel for piece in pieces) for name, pieces in self.pieces.items()}
        self.model_states = [_load(self.folder, f"{prefix}mp_rank_00_model_states.pt") for prefix in self._prefixes()]
        self.module: dict[str, Tensor] = self.model_states[0]["module"]

    def _prefixes(self) -> list[str]:
        return [f"zero_pp_rank_{rank}_" for rank in range(self.size)] if self.stage == 3 else [""]

    def optimizer_states(self) -> list[dict[str, Any]]:
        """What DeepSpeed's ZeRO optimizer has saved on each rank."""
        names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(self.size)]
        return [_load(self.folder, name)[OPTIMIZER_STATE_DICT] for name in names]

    def shape(self, name: str) -> torch.Size:
        """Of a parameter."""
        if self.stage < 3:
            return self.module[name].shape
        shapes = (*self.model_states[0]["param_shapes"], self.model_states[0]["frozen_param_shapes"] or {})
        return next(torch.Size(group[name]) for group in shapes if name in group)

    def frozen(self, name: str) -> Tensor:
        """A parameter that is not trained, flat."""
        if self.stage < 3:
            return self.module[name].view(-1)
        blocks = [saved["frozen_param_fragments"][name] for saved in self.model_states]
        return torch.cat(blocks)[: self.shape(name).numel()]

    def gather(
        self, segments: Sequence[Segment], sizes: Sequence[int], dtype: torch.dtype, read: Callable[[int, int], Any]
    ) -> list[Tensor]:
        """Flat tensors of these sizes with the values that belong into ``segments`` of them, and zeros elsewhere.

        Args:
            read: the values that a rank has saved for a shard: a flat tensor, or what can be sliced like one.
        """
        tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
        for segment in segments:
            begin, end = segment.param_start, segment.param_start + segment.numel
            for piece in self.pieces[segment.name]:
                start, stop = max(begin, piece.param_start), min(end, piece.param_start + piece.numel)
                if start < stop:
                    here, there = segment.shard_start - begin, piece.shard_start - piece.param_start
                    values = read(piece.rank, piece.shard)[start + there : stop + there]
                    tensors[segment.shard][start + here : stop + here] = values
        return tensors


def masters_of(state: Mapping[str, Any]) -> list[Tensor]:
    """Of a ZeRO optimizer's saved state; padding at their end may be missing."""
    masters: list[Tensor] = state[FP32_FLAT_GROUPS if FP32_FLAT_GROUPS in state else SINGLE_PARTITION_OF_FP32_GROUPS]
    return masters


def _load(folder: Path, pattern: str) -> dict[str, Any]:
    path = next(folder.glob(pattern), None)
    if path is None:
        raise CheckpointError(f"{folder / pattern}: missing; name another checkpoint with --tag")
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state
