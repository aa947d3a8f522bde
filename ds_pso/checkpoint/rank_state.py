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
from ds_pso.session.parts import SwarmState


def own_tensors(swarm: SwarmState) -> dict[str, Tensor]:
    """What differs from rank to rank and DeepSpeed does not keep: state of rule and wire, the movement of a
    delayed sync point, and the buffers, live.

    Batch-norm statistics are a rank's own, and DeepSpeed saves those of one rank of each particle.
    """
    states = swarm.synchronizer.updater.state if swarm.synchronizer else []
    tensors = {f"rule.{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}
    if swarm.synchronizer and swarm.synchronizer.updater.differences:
        differences = swarm.synchronizer.updater.differences
        tensors |= {f"wire.{i}.common": value for i, value in enumerate(differences.common)}
        tensors |= {f"wire.{i}.residual": value for i, value in enumerate(differences.residual)}
    if swarm.synchronizer and swarm.synchronizer.pending:
        tensors |= {f"pending.{i}": value for i, value in enumerate(swarm.synchronizer.pending.movement)}
    persistent = swarm.engine.module.state_dict().keys()
    tensors |= {f"buffer.{n}": b for n, b in swarm.engine.module.named_buffers() if n in persistent}
    return tensors


def model_fingerprint(swarm: SwarmState) -> str:
    if swarm.synchronizer is not None:
        return swarm.synchronizer.shards.fingerprint()
    shapes = [(n, list(getattr(p, "ds_shape", p.shape))) for n, p in swarm.engine.module.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def identity(swarm: SwarmState) -> dict[str, Any]:
    """What must be equal where a checkpoint is loaded; JSON values by the names that it has in the record."""
    layout = swarm.world.layout
    return {
        "num_particles": layout.num_particles,
        "particle_size": layout.particle_size,
        "sync_mode": swarm.config.sync_mode,
        "wire": swarm.config.wire,
        "turns": swarm.config.turns,
        "zero_stage": swarm.engine.zero_optimization_stage(),
        "model": model_fingerprint(swarm),
    }


def taken(swarm: SwarmState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of this rank, as they are now; they do not change when training goes on."""
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in own_tensors(swarm).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()  # on the CPU, as torch's
    numpy_state: Any = np.random.get_state()
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": swarm.engine.global_steps,
        **identity(swarm),
        "shards": describe_shards(swarm),
        "window": swarm.window.state(),
        "synchronizer": swarm.synchronizer.state_dict() if swarm.synchronizer else None,
        "samplers": [sampler.state_dict() for sampler in swarm.samplers],
        "random": {
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        },
    }
    return json.loads(json.dumps(record)), tensors


def restore(swarm: SwarmState, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Continue from what ``taken`` has returned; all of it has been checked."""
    movement = [tensors[f"pending.{i}"] for i in range(sum(key.startswith("pending.") for key in tensors))]
    if swarm.synchronizer is not None:
        swarm.synchronizer.load_state_dict(record["synchronizer"], movement)
    for key, value in own_tensors(swarm).items():
        value.copy_(tensors[key])
    swarm.window.restore(*record["window"])
    for sampler, state in zip(swarm.samplers, record["samplers"], strict=True):
        sampler.load_state_dict(state)
    _restore_random(record, tensors)
    for sampler in swarm.samplers:
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
