"""Writes one model of the swarm in Hugging Face format, gathered from the shards.

No rank ever holds more than one extra shard and one full parameter; the leader collects the
whole model once, in CPU memory, as ``save_pretrained`` needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ds_pso.distributed.local_group import local_device
from ds_pso.errors import ConfigError
from ds_pso.export import contents
from ds_pso.export.stages import gather_stages, write_stages
from ds_pso.session.session import Session
from ds_pso.shards import Segment, Shards, find_shards
from ds_pso.shards.engine import num_stages
from ds_pso.shards.experts import WholeParameter, replicas_of
from ds_pso.shards.tensor_parallel import made_whole
from ds_pso.shards.untrained import as_bytes
from ds_pso.sync.consensus import Choice, Collected
from ds_pso.utils.model_folder import replacing_model
from ds_pso.utils.wrappers import plain_name, taken_off, without_wrapper_parts

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """A tokenizer or processor that can be saved beside a model."""

    def save_pretrained(self, folder: Path, /) -> object: ...


def export(session: Session, folder: Path, which: Choice = "consensus", tokenizer: Tokenizer | None = None) -> Path:
    """Write the model to ``folder``; ``from_pretrained(folder)`` opens it. Called on all ranks.

    Files of the same names are replaced; whatever else is in the folder stays.

    Args:
        which: ``consensus``, the mean of the particles whose weights are finite, or ``best``, the
            particle with the lowest loss at the last sync point.
        tokenizer: saved beside the model, if given.

    Raises:
        ConfigError: ``which`` is neither of the two, or no particle has finite weights.
        UnsupportedError: what would be written is not what ``from_pretrained`` looks for; the folder stays as it was.
    """
    if which not in ("consensus", "best"):
        raise ConfigError(f'export which = {which!r}: must be "consensus" or "best"')
    begin = time.perf_counter()
    if session.synchronizer is not None:
        shards = session.synchronizer.parts.shards
        model = session.synchronizer.consensus.collect(which)
        of_module = session.num_particles == 1 and session.synchronizer.parts.rule.model_in == "x"
    else:
        of_module = True
        shards = find_shards(session.engine)
        with shards.mapped(writes=False), shards.evaluating(), as_bytes(shards.frozen.counters()) as counters:
            tensors = [tensor.clone() for tensor in shards.tensors]
            model = Collected(tensors, [buffer for _, buffer in shards.buffers()], counters)
    state_dict = _state_dict(session, shards, model)
    with session.world.coordinator.agree("exporting the model"):
        if session.is_leader:
            with replacing_model(folder) as temporary:
                if num_stages(session.engine) > 1:
                    write_stages(state_dict, temporary)
                else:
                    holds_all = all(parameter.is_here for parameter in shards.whole)
                    trained = _trained(shards)
                    _write(shards.module, state_dict, trained, temporary, holds_all=holds_all, of_module=of_module)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
            log.info("%s: exported the %s model in %.1f s", folder, which, time.perf_counter() - begin)
    return folder


def _state_dict(session: Session, shards: Shards, model: Collected) -> dict[str, Tensor]:
    """Return the whole model in its working dtype on the leader, under names without wrappers; elsewhere a part."""
    module = shards.module
    state_dict: dict[str, Tensor] = {}
    collects = _collects(session)
    for parameter, tensor in _parameters(session, shards, model.tensors):
        if collects:
            state_dict[_plain(module, parameter)] = tensor.cpu()
    if not collects:
        return state_dict
    for (name, buffer), values in zip(shards.buffers(), model.buffers, strict=True):
        state_dict[plain_name(module, name)] = values.view(buffer.shape).cpu()
    averaged = dict(shards.buffers())
    counters = [(name, buffer) for name, buffer in shards.persistent_buffers() if name not in averaged]
    for (name, buffer), values in zip(counters, model.counters, strict=True):
        state_dict[plain_name(module, name)] = values.view(buffer.dtype).view(buffer.shape).cpu()
    return state_dict if num_stages(session.engine) == 1 else gather_stages(session.engine, state_dict)


def _collects(session: Session) -> bool:
    """Return true on the leader, and on the first rank of each stage of its particle's pipeline."""
    if num_stages(session.engine) == 1:
        return session.is_leader
    with_leader = any(row[0] for row in session.world.local.gather([float(session.is_leader)]))
    return with_leader and session.engine.mpu.get_data_parallel_rank() == 0


def _plain(module: torch.nn.Module, parameter: WholeParameter) -> str:
    """Return the name of a parameter of the whole model, without wrappers."""
    name = plain_name(module, parameter.name)
    return name if parameter.is_here else without_wrapper_parts(name)  # the wrappers themselves are elsewhere


def _parameters(session: Session, shards: Shards, tensors: list[Tensor]) -> Iterator[tuple[WholeParameter, Tensor]]:
    """Yield full parameters, one at a time; their values are right on the first data-parallel rank of each stage."""
    pieces: dict[str, list[Segment]] = {}
    for segment in shards.segments:
        pieces.setdefault(segment.name, []).append(segment)
    trained = shards.trained_names()  # all ranks must reduce the same parameters
    for parameter in shards.whole:
        if parameter.name not in trained:
            yield parameter, _frozen(parameter)
            continue
        like = parameter.like
        shape = getattr(like, "ds_shape", like.shape)
        full = torch.zeros(shape.numel(), dtype=torch.float32, device=local_device())
        for s in pieces.get(parameter.name, []):
            values = tensors[s.shard][s.shard_start : s.shard_start + s.numel]
            full[s.param_start : s.param_start + s.numel].copy_(values)
        group = session.engine.seq_data_parallel_group
        if dist.get_world_size(group) > 1:
            dist.reduce(full, dist.get_global_rank(group, 0), group=group)  # zero on all ranks but an element's owner
        yield parameter, made_whole(like, full.view(shape).to(like.dtype))


def _frozen(parameter: WholeParameter) -> Tensor:
    """Return a parameter that is not trained, gathered if ZeRO 3 or AutoTP has divided it, or if it is of an expert."""
    like = parameter.like
    replicas = replicas_of(like)
    if replicas is not None:
        full = like.detach().clone() if parameter.is_here and dist.get_rank(replicas) == 0 else torch.zeros_like(like)
        dist.reduce(full, 0)  # zero on all ranks but one
        return full.detach()
    if hasattr(like, "ds_id"):
        with deepspeed.zero.GatheredParameters([like]):
            return made_whole(like, like.detach().clone())
    return made_whole(like, like.detach())


def _trained(shards: Shards) -> set[str]:
    """Return the names, as they are written, of all parameters that are trained."""
    names = shards.trained_names()
    return {_plain(shards.module, p) for p in shards.whole if p.name in names and p.like.requires_grad}


def _write(
    module: torch.nn.Module,
    state_dict: dict[str, Tensor],
    trained: set[str],
    folder: Path,
    *,
    holds_all: bool,
    of_module: bool,
) -> None:
    """Write the model, and compare what is in its files with what will be looked for.

    Args:
        holds_all: whether this rank's module has all parameters of the model.
        of_module: whether the values are those that the module holds.
    """
    with taken_off(module) as plain:
        opened = contents.as_opened(plain)
        tied = contents.tied_names(plain)
        contents.untied(state_dict, tied, opened)
        if not contents.saves_itself(plain):
            state_dict |= {name: state_dict[source].clone() for name, source in tied.items()}
        if holds_all or opened is not plain:
            contents.check_tensors(state_dict, trained, opened)
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if contents.saves_itself(plain):
            plain.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
        else:
            save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / "model.safetensors")
        contents.check_files(folder, shapes, trained, opened, of_module=of_module)
