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
from ds_pso.session.session import Session
from ds_pso.shards import Segment, Shards, find_shards
from ds_pso.shards.untrained import as_bytes
from ds_pso.sync.consensus import Choice, Collected
from ds_pso.utils.model_folder import replacing_model
from ds_pso.utils.wrappers import plain_name, taken_off

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
        with as_bytes(shards.frozen.counters()) as counters:
            model = Collected(shards.tensors, [buffer for _, buffer in shards.buffers()], counters)
    state_dict = _state_dict(session, shards, model)
    with session.world.coordinator.agree("exporting the model"):
        if session.is_leader:
            with replacing_model(folder) as temporary:
                _write(session.engine.module, state_dict, shards.trained_names(), temporary, of_module=of_module)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
            log.info("%s: exported the %s model in %.1f s", folder, which, time.perf_counter() - begin)
    return folder


def _state_dict(session: Session, shards: Shards, model: Collected) -> dict[str, Tensor]:
    """Return the whole model in its working dtype on the leader, under names without wrappers; elsewhere nothing."""
    module = shards.module
    state_dict: dict[str, Tensor] = {}
    for name, tensor in _parameters(session, shards, model.tensors):
        if session.is_leader:
            state_dict[plain_name(module, name)] = tensor.cpu()
    if not session.is_leader:
        return state_dict
    for (name, buffer), values in zip(shards.buffers(), model.buffers, strict=True):
        state_dict[plain_name(module, name)] = values.view(buffer.shape).cpu()
    averaged = dict(shards.buffers())
    counters = [(name, buffer) for name, buffer in shards.persistent_buffers() if name not in averaged]
    for (name, buffer), values in zip(counters, model.counters, strict=True):
        state_dict[plain_name(module, name)] = values.view(buffer.dtype).view(buffer.shape).cpu()
    return state_dict


def _parameters(session: Session, shards: Shards, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield full parameters, one at a time; their values are right on rank 0 of each particle."""
    pieces: dict[str, list[Segment]] = {}
    for segment in shards.segments:
        pieces.setdefault(segment.name, []).append(segment)
    trained = shards.trained_names()  # all ranks must reduce the same parameters
    for name, parameter in shards.module.named_parameters():
        if name not in trained:
            yield name, _frozen(parameter)
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        full = torch.zeros(shape.numel(), dtype=torch.float32, device=local_device())
        for s in pieces.get(name, []):
            values = tensors[s.shard][s.shard_start : s.shard_start + s.numel]
            full[s.param_start : s.param_start + s.numel].copy_(values)
        if session.world.layout.particle_size > 1:
            dist.reduce(full, 0)  # an element is zero on all ranks but its owner
        yield name, full.view(shape).to(parameter.dtype)


def _frozen(parameter: Tensor) -> Tensor:
    """Return a parameter that is not trained, gathered if ZeRO 3 has partitioned it."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _write(
    module: torch.nn.Module, state_dict: dict[str, Tensor], trained: set[str], folder: Path, *, of_module: bool
) -> None:
    """Write the model, and compare what is in its files with what will be looked for.

    Args:
        trained: names of the parameters in the optimizer, as in ``module.named_parameters()``.
        of_module: whether the values are those that the module holds.
    """
    parameters = dict(module.named_parameters())
    trained = {plain_name(module, name) for name in trained if parameters[name].requires_grad}
    with taken_off(module) as plain:
        opened = contents.as_opened(plain)
        tied = contents.tied_names(plain)
        contents.untied(state_dict, tied, opened)
        if not contents.saves_itself(plain):
            state_dict |= {name: state_dict[source].clone() for name, source in tied.items()}
        contents.check_tensors(state_dict, trained, opened)
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if contents.saves_itself(plain):
            plain.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
        else:
            save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / "model.safetensors")
        contents.check_files(folder, shapes, trained, opened, of_module=of_module)
