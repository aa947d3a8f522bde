"""The state of a rank that DeepSpeed's own checkpoint does not hold: taken, restored, and what it must fit."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import astuple
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ds_pso.checkpoint.format import FORMAT, Identity, RankRecord, ShardRecord
from ds_pso.errors import SwarmError
from ds_pso.session.session import Session
from ds_pso.shards import find_shards
from ds_pso.shards.engine import tensor_parallel_size
from ds_pso.utils.wrappers import without_wrapper_parts


def own_tensors(session: Session) -> dict[str, Tensor]:
    """Return the tensors that differ from rank to rank and that DeepSpeed does not save, live.

    They are the state of rule and wires, the movement of a delayed sync point, and the buffers: batch-norm
    statistics are a rank's own, and DeepSpeed saves those of one rank of each particle.
    """
    states = session.synchronizer.parts.updater.state if session.synchronizer else []
    tensors = {f"rule.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}
    if session.synchronizer and session.synchronizer.parts.updater.differences:
        differences = session.synchronizer.parts.updater.differences
        tensors |= {f"wire.{i}.common": value for i, value in enumerate(differences.common)}
        tensors |= {f"wire.{i}.residual": value for i, value in enumerate(differences.residual)}
    if session.synchronizer and session.synchronizer.overlap.pending:
        tensors |= {f"pending.{i}": value for i, value in enumerate(session.synchronizer.overlap.pending.movement)}
    if session.synchronizer and session.synchronizer.parts.moments:
        residuals = session.synchronizer.parts.moments.residuals()
        tensors |= {f"moments.{name}": value for name, value in residuals.items()}
        if session.synchronizer.overlap.pending:
            late = session.synchronizer.overlap.pending.moments
            tensors |= {f"moments.late.{i}": moment.tensor for i, moment in enumerate(late)}
    # A wrapper may leave its part of a name out of one of the two.
    persistent = {without_wrapper_parts(name) for name in session.engine.module.state_dict()}
    named = session.engine.module.named_buffers()
    tensors |= {f"buffer.{n}": b for n, b in named if without_wrapper_parts(n) in persistent}
    return tensors


def model_fingerprint(session: Session) -> str:
    """Return a hash of what this rank trains; of a lone particle, whose shards need not be readable, its shapes."""
    if session.synchronizer is not None:
        return session.synchronizer.parts.shards.fingerprint()
    shapes = [(n, list(getattr(p, "ds_shape", p.shape))) for n, p in session.engine.module.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def identity(session: Session) -> Identity:
    """Return the values of this run that a checkpoint must have, too."""
    layout = session.world.layout
    return {
        "num_particles": layout.num_particles,
        "particle_size": layout.particle_size,
        "sync_mode": session.config.sync_mode,
        "wire": session.config.wire,
        "turns": session.config.turns,
        "zero_stage": session.engine.zero_optimization_stage(),
        "model": model_fingerprint(session),
    }


def describe_shards(session: Session) -> ShardRecord | None:
    """Return where each element of this rank's shards belongs, so that a model can be read without an engine.

    None if the shards cannot be read: a lone particle needs nothing of them to train.
    """
    if session.synchronizer is not None:
        shards, model_in = session.synchronizer.parts.shards, session.synchronizer.parts.rule.model_in
    else:
        try:
            shards, model_in = find_shards(session.engine), "x"
        except SwarmError:
            return None
    return {"model_in": model_in, "segments": [astuple(segment) for segment in shards.segments]}


def taken(session: Session) -> tuple[RankRecord, dict[str, Tensor]]:
    """Return record and tensors of this rank, as they are now; they do not change when training goes on."""
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in own_tensors(session).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()  # on the CPU, as torch's
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    record: RankRecord = {
        "format": FORMAT,
        "step": session.engine.global_steps,
        **identity(session),
        "shards": describe_shards(session),
        "window": session.window.state(),
        "synchronizer": session.synchronizer.state_dict() if session.synchronizer else None,
        "samplers": [sampler.state_dict() for sampler in session.samplers],
        "tensor_parallel": tensor_parallel_size(session.engine),
        "random": {
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        },
    }
    return cast(RankRecord, json.loads(json.dumps(record))), tensors


def restore(session: Session, record: RankRecord, tensors: dict[str, Tensor]) -> None:
    """Continue from what ``taken`` has returned; all of it has been checked."""
    movement = [tensors[f"pending.{i}"] for i in range(sum(key.startswith("pending.") for key in tensors))]
    late = [tensors[f"moments.late.{i}"] for i in range(sum(key.startswith("moments.late.") for key in tensors))]
    if session.synchronizer is not None and record["synchronizer"] is not None:
        session.synchronizer.load_state_dict(record["synchronizer"], movement, late)
    if session.synchronizer is not None and session.synchronizer.parts.moments is not None:
        kept = {key.removeprefix("moments."): value for key, value in tensors.items() if key.startswith("moments.")}
        session.synchronizer.parts.moments.load_residuals(kept)
    for key, value in own_tensors(session).items():
        if not key.startswith("moments."):
            value.copy_(tensors[key])
    if session.synchronizer is not None:
        session.synchronizer.reloaded()
    session.uploads.known = record["step"]
    total, count, steps, first = record["window"]
    session.window.restore(total, int(count), int(steps), first)
    for sampler, state in zip(session.samplers, record["samplers"], strict=True):
        sampler.load_state_dict(state)
    _restore_random(record, tensors)
    for sampler in session.samplers:
        sampler.on_resume = lambda: _restore_random(record, tensors)


def _restore_random(record: RankRecord, tensors: dict[str, Tensor]) -> None:
    if record["random"] is None:
        return  # a rank that was not there: it begins from its seed
    version, internal, gauss = record["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(record["random"]["numpy"]))
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
