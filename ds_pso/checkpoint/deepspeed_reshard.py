"""DeepSpeed's checkpoint of one particle, as this rank of an engine with another partition would have saved it.

DeepSpeed's universal checkpoint (0.19.8) knows the moments of Adam alone, leaves frozen parameters as they are in the
engine, and unpickles whatever it finds. Here the records say where each element lies, so any optimizer whose state is
as large as its parameters will do, files are mapped into memory, and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_pso.checkpoint.reader import ModelStates, SavedParticle, is_of_expert
from ds_pso.errors import CheckpointError
from ds_pso.shards import Engine, SavedPartition, Shards
from ds_pso.shards.optimizer_state import MUON_MOMENTUM
from ds_pso.utils.wrappers import without_wrapper_parts

_OF_THE_GROUP = ("params", "name")  # DeepSpeed names a group of experts after the number of ranks they are spread over


def check_same_model(saved: SavedParticle, engine: Engine, shards: Shards) -> None:
    """Raise CheckpointError unless the engine trains the parameters that were saved, with such an optimizer."""
    reason = _difference(saved, engine, shards)
    if reason:
        raise _other_model(saved, reason)


def _difference(saved: SavedParticle, engine: Engine, shards: Shards) -> str | None:
    foreign = saved.pieces.keys() ^ {without_wrapper_parts(name) for name in shards.trained_names()}
    if foreign:
        return f"{min(foreign)} was trained there or is here, but not both"
    for parameter in shards.whole:
        name, like = without_wrapper_parts(parameter.name), parameter.like
        if name not in saved.module:
            return f"{name} was not saved"
        now = (tuple(getattr(like, "ds_shape", like.shape)), like.dtype)
        before = (tuple(saved.shape(name)), saved.module[name].dtype)
        if now != before:
            return f"{name} was saved as {before[1]} {list(before[0])}, and is {now[1]} {list(now[0])} now"
    if engine.optimizer.state_dict().keys() != saved.optimizers[0].values.keys():
        return f"its optimizer is not a {type(engine.optimizer).__name__} as configured now"
    return None


def repartitioned(saved: SavedParticle, engine: Engine, shards: Shards) -> RepartitionedFiles | None:
    """Read what DeepSpeed shall find in its files; the engine stays as it is.

    None at ZeRO 0, where DeepSpeed's files are the same on any number of ranks.

    Raises:
        CheckpointError: other parameter groups, or the optimizer keeps something that cannot be divided.
    """
    states = [state for state in saved.optimizers if isinstance(state, SavedPartition)]
    if not states:
        return None
    if engine.zero_elastic_checkpoint() or states[0].is_merged:
        raise CheckpointError(
            f"{saved.folder}: zero_optimization.elastic_checkpoint = true keeps the optimizer's state in a form of "
            "its own; set it to false on the old ranks, save there, and resume from that"
        )
    part = _Repartition(saved, states, engine, shards)
    return RepartitionedFiles(saved.folder, part.model(), part.optimizer().values)


class _Repartition:
    """Makes this rank's part of a particle from the parts that were saved."""

    def __init__(self, saved: SavedParticle, states: Sequence[SavedPartition], engine: Engine, shards: Shards) -> None:
        self._saved, self._states, self._engine, self._shards = saved, states, engine, shards
        self._sizes = shards.numels

    def model(self) -> ModelStates:
        """Return DeepSpeed's model states, with this rank's blocks of frozen parameters."""
        rank = self._engine.seq_data_parallel_group.rank()
        model = self._saved.model_states[rank % len(self._saved.model_states)].copy()
        model["dp_world_size"] = self._engine.seq_dp_world_size
        if self._saved.stage == 3 and (frozen := model.get("frozen_param_fragments")):
            model["frozen_param_fragments"] = {
                name: self._block(name, parameter.ds_tensor.numel(), rank)  # type: ignore[attr-defined]
                for name, parameter in self._engine.module.named_parameters()
                if name in frozen
            }
        return model

    def _block(self, name: str, numel: int, rank: int) -> Tensor:
        """Return this rank's part of a parameter that is not trained; zeros behind its end."""
        whole = self._saved.frozen(name)
        part = whole[rank * numel : (rank + 1) * numel]
        return torch.cat([part, part.new_zeros(numel - part.numel())])

    def optimizer(self) -> SavedPartition:
        """Return the engine's own state, with what was saved in place of its values."""
        theirs = self._states[0]
        mine = theirs.format.read(self._engine.optimizer.state_dict())  # of the same class: they have the same keys
        self._check_groups(mine)
        mine.copy_common(theirs)
        masters = self._saved.masters()
        mine.replace_masters(
            self._saved.gather(
                self._shards.segments, self._sizes, torch.float32, lambda rank, shard: masters[rank][shard]
            )
        )
        mine.base["state"] = self._moments([mine.group_of(shard) for shard in range(len(self._sizes))])
        mine.base["param_groups"] = [
            {**saved, **{name: own[name] for name in _OF_THE_GROUP if name in own}}
            for own, saved in zip(mine.base["param_groups"], theirs.base["param_groups"], strict=True)
        ]
        return mine

    def _moments(self, groups: Sequence[int]) -> dict[int, dict[str, object]]:
        """Return the state that the wrapped optimizer keeps for each shard, given the parameter group of each."""
        saved = [state.base["state"] for state in self._states]
        found: dict[int, dict[str, object]] = {}
        for shard, group in enumerate(groups):
            like = self._states[0].masters_in_group(group)[0]
            for name, value in saved[0].get(like, {}).items():
                if name == MUON_MOMENTUM and self._keeps_whole_matrices(group):
                    found.setdefault(shard, {})[name] = self._momentum_of_matrices(shard)
                    continue
                if isinstance(value, Tensor) and value.dim():
                    self._check_size(name, value, like)
                else:  # a count of steps, equal on all ranks; each shard must have its own
                    value = copy.deepcopy(value)
                found.setdefault(shard, {})[name] = value
        whole = {shard for shard, group in enumerate(groups) if self._keeps_whole_matrices(group)}
        for name in {name for state in found.values() for name in state}:
            divided = {k: v for k, s in found.items() if isinstance(v := s.get(name), Tensor) and v.dim()}
            if name == MUON_MOMENTUM:
                divided = {shard: value for shard, value in divided.items() if shard not in whole}
            if not divided:
                continue

            def read(rank: int, shard: int, name: str = name) -> Tensor:
                value = saved[rank][shard][name]
                assert isinstance(value, Tensor)
                return value

            segments = [s for s in self._shards.segments if s.shard in divided]
            parts = self._saved.gather(segments, self._sizes, next(iter(divided.values())).dtype, read)
            for shard in divided:
                found[shard][name] = parts[shard]
        return found

    def _keeps_whole_matrices(self, group: int) -> bool:
        """Return true if Muon has a group: below ZeRO 3 a rank keeps the momentum of all matrices it has a part of."""
        return self._saved.stage < 3 and bool(self._states[0].base["param_groups"][group].get("use_muon"))

    def _momentum_of_matrices(self, shard: int) -> Tensor:
        """Return what this rank keeps for a shard: the momentum of each matrix, whole, one behind the other."""
        segments = [segment for segment in self._shards.segments if segment.shard == shard]
        names = dict.fromkeys(without_wrapper_parts(segment.name) for segment in segments)
        return torch.cat([self._saved_momentum(name) for name in names])

    def _saved_momentum(self, name: str) -> Tensor:
        """Return the momentum of a matrix, flat: any rank that has a part of the matrix has saved it."""
        piece, start = self._saved.pieces[name][0], 0
        there = [
            (other.shard_start, other_name)
            for other_name, pieces in self._saved.pieces.items()
            for other in pieces
            if (other.rank, other.shard) == (piece.rank, piece.shard)
        ]
        for _, other_name in sorted(there):
            if other_name == name:
                break
            start += self._saved.numel(other_name)
        momentum = self._states[piece.rank].base["state"][piece.shard][MUON_MOMENTUM]
        assert isinstance(momentum, Tensor)
        return momentum[start : start + self._saved.numel(name)]

    def _check_groups(self, mine: SavedPartition) -> None:
        theirs = self._states[0]
        count, before = len(mine.base["param_groups"]), len(theirs.base["param_groups"])
        if count != before:
            raise _other_model(self._saved, f"its optimizer has {before} parameter groups, and {count} now")
        for segment in self._shards.segments:
            group = theirs.group_of(self._saved.pieces[without_wrapper_parts(segment.name)][0].shard)
            if mine.group_of(segment.shard) != group:
                raise _other_model(self._saved, f"{segment.name} was in parameter group {group}, and now is not")

    def _check_size(self, name: str, value: Tensor, shard: int) -> None:
        lean, padded = self._states[0].masters[shard].numel(), self._states[0].padded_numel(shard)
        if value.dim() > 1 or value.numel() not in (lean, padded):
            raise CheckpointError(
                f"{self._saved.folder}: its optimizer keeps {name} of shape {list(value.shape)} for {lean} elements, "
                "which cannot be divided anew; resume with the ranks per particle it was saved with"
            )


@dataclass(frozen=True)
class RepartitionedFiles:
    """The content of DeepSpeed's files, as this rank would have saved them.

    Attributes:
        folder: the one that was saved.
        model: the model states.
        optimizer: the optimizer's state.
    """

    folder: Path
    model: ModelStates
    optimizer: dict[str, object]

    @contextlib.contextmanager
    def in_place_of_the_files(self, engine: Engine) -> Iterator[None]:
        """In the block ``engine.load_checkpoint`` of the folder that was saved loads this."""
        reader = engine.checkpoint_engine
        some_file = str(next(path for path in self.folder.glob("*_model_states.pt") if not is_of_expert(path)))
        engine.checkpoint_engine = _Reader(self)  # type: ignore[assignment]  # nothing is written in the block
        engine._get_all_ckpt_names = lambda *_: [some_file]  # a rank with a new number has none of its own
        try:
            yield
        finally:
            engine.checkpoint_engine = reader
            del engine._get_all_ckpt_names


class _Reader:
    """Stands where DeepSpeed has the object that reads its files."""

    def __init__(self, content: RepartitionedFiles) -> None:
        self._content = content

    def load(self, path: str, map_location: object = None) -> object:
        if is_of_expert(Path(path)):  # the same file on any number of ranks
            return torch.load(path, map_location="cpu", weights_only=True)
        if Path(path).name.endswith("_model_states.pt"):
            return self._content.model
        return {"optimizer_state_dict": self._content.optimizer}


def _other_model(saved: SavedParticle, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{saved.folder}: {reason}; build the model, precision and parameter groups it was saved with, or start "
        "without resuming"
    )
