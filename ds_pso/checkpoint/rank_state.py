"""What a rank keeps beside DeepSpeed's own checkpoint: taken, restored, and what it must fit."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_pso.checkpoint.format import FORMAT
from ds_pso.checkpoint.model_layout import describe_shards
from ds_pso.session.session import Session


def own_tensors(session: Session) -> dict[str, Tensor]:
    """What differs from rank to rank and DeepSpeed does not keep: state of rule and wire, the movement of a
    delayed sync point, and the buffers, live.

    Batch-norm statistics are a rank's own, and DeepSpeed saves those of one rank of each particle.
    """
    states = session.synchronizer.parts.updater.state if session.synchronizer else []
    tensors = {f"rule.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}
    if session.synchronizer and session.synchronizer.parts.updater.differences:
        differences = session.synchronizer.parts.updater.differences
        tensors |= {f"wire.{i}.common": value for i, value in enumerate(differences.common)}
        tensors |= {f"wire.{i}.residual": value for i, value in enumerate(differences.residual)}
    if session.synchronizer and session.synchronizer.overlap.pending:
        tensors |= {f"pending.{i}": value for i, value in enumerate(session.synchronizer.overlap.pending.movement)}
    persistent = session.engine.module.state_dict().keys()
    tensors |= {f"buffer.{n}": b for n, b in session.engine.module.named_buffers() if n in persistent}
    return tensors


def model_fingerprint(session: Session) -> str:
    if session.synchronizer is not None:
        return session.synchronizer.parts.shards.fingerprint()
    shapes = [(n, list(getattr(p, "ds_shape", p.shape))) for n, p in session.engine.module.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def identity(session: Session) -> dict[str, Any]:
    """What must be equal where a checkpoint is loaded; JSON values by the names that it has in the record."""
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


def taken(session: Session) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of this rank, as they are now; they do not change when training goes on."""
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in own_tensors(session).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()  # on the CPU, as torch's
    numpy_state: Any = np.random.get_state()
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": session.engine.global_steps,
        **identity(session),
        "shards": describe_shards(session),
        "window": session.window.state(),
        "synchronizer": session.synchronizer.state_dict() if session.synchronizer else None,
        "samplers": [sampler.state_dict() for sampler in session.samplers],
        "random": {
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        },
    }
    return json.loads(json.dumps(record)), tensors


def restore(session: Session, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Continue from what ``taken`` has returned; all of it has been checked."""
    movement = [tensors[f"pending.{i}"] for i in range(sum(key.startswith("pending.") for key in tensors))]
    if session.synchronizer is not None:
        session.synchronizer.load_state_dict(record["synchronizer"], movement)
    for key, value in own_tensors(session).items():
        value.copy_(tensors[key])
    session.window.restore(*record["window"])
    for sampler, state in zip(session.samplers, record["samplers"], strict=True):
        sampler.load_state_dict(state)
    _restore_random(record, tensors)
    for sampler in session.samplers:
        sampler.on_resume = lambda: _restore_random(record, tensors)


def _restore_random(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if record["random"] is None:
        return  # a rank that was not there: it begins from its seed
    version, internal, gauss = record["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(record["random"]["numpy"]))
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
