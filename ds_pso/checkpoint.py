"""Saves a whole swarm so that it resumes bit for bit, and refuses what does not fit.

Layout of a checkpoint folder::

    latest                      name of the newest complete checkpoint
    step_00000064/
        particle_0/deepspeed/   DeepSpeed's own checkpoint of particle 0
        particle_0/model/       its Hugging Face config, if it has one
        particle_1/deepspeed/
        swarm/rank_00000.json          this rank's counters, random state, data position, file hashes
        swarm/rank_00000.safetensors   its rule state (velocity, anchor, ...), buffers, torch's random state

Everything is written to ``.step_00000064.tmp`` and renamed when all ranks are done; only then
does ``latest`` move. Where the HF Trainer has written a particle's checkpoint, ``swarm/`` is put beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ds_pso.blueprint import MODEL, describe_shards, save_model_config
from ds_pso.checkpoint_fallback import newest_whole
from ds_pso.checkpoint_files import (
    DEEPSPEED_TAG,
    FORMAT,
    check_files,
    find,
    parse_record,
    rank_stem,
    weights_only,
)
from ds_pso.checkpoint_writer import Copies, as_checkpoint_error, complete, copying, prune, write_part
from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.reshape import Reshaped, is_of_another_shape
from ds_pso.roster import Roster
from ds_pso.state import SwarmState

# -- saving ---------------------------------------------------------------------------------


def save(swarm: SwarmState, folder: Path, keep: int | None = None, *, background: bool = False) -> Path:
    """Write ``folder/step_<n>`` and move ``latest`` to it. Called on all ranks, between steps.

    Args:
        keep: how many of the newest to leave; None: all.
        background: return when the state is copied to main memory; the rest happens beside training.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written, now or for the one before, that was
            written in the background; what was there stays.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"swarm.save keep = {keep}: must be at least 1, or None to keep all")
    swarm.writer.wait()
    name = f"step_{swarm.engine.global_steps:08d}"
    temporary, final = folder / f".{name}.tmp", folder / name
    particle = temporary / f"particle_{swarm.particle}"
    world = swarm.world
    with as_checkpoint_error(folder):
        leads = world.leads_disk(folder)
    with world.agree("starting a checkpoint"), as_checkpoint_error(temporary):
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "swarm").mkdir(parents=True, exist_ok=True)
    with world.agree("starting a checkpoint"), as_checkpoint_error(temporary):
        save_model_config(swarm, particle / MODEL)
    saving = copying(swarm.engine) if background else contextlib.nullcontext(Copies())
    # Not inside agree: its barriers would leave the others waiting while this rank waits for them.
    with as_checkpoint_error(temporary), saving as copies:
        swarm.engine.save_checkpoint(str(particle), tag=DEEPSPEED_TAG, save_latest=False)
    with world.agree("copying a checkpoint"):  # nobody writes before all have seen which files are there
        record, tensors = _part(swarm)
        files = _my_share(particle, swarm)

    def finish(roster: Roster) -> None:
        with roster.agree("writing a checkpoint"), as_checkpoint_error(temporary):
            write_part(temporary, world.layout.rank, record, tensors, [*files, *copies.write()])
        with roster.agree("completing a checkpoint"), as_checkpoint_error(final):
            if leads:
                complete(temporary, final)
        if leads and keep is not None:
            prune(final, keep)

    if background:
        swarm.writer.follow(world.beside(finish))
    else:
        finish(world)
    return final


def save_part(swarm: SwarmState, folder: Path) -> None:
    """Add the swarm's part to ``folder``, into which a trainer has just written its checkpoint of this particle.

    Called on all ranks, between steps; a rank's JSON, its last file, says what the folder must hold.

    Raises:
        CheckpointError: as ``save`` does.
    """
    with swarm.world.agree("starting a checkpoint"), as_checkpoint_error(folder):
        (folder / "swarm").mkdir(exist_ok=True)
    with swarm.world.agree("completing a checkpoint"), as_checkpoint_error(folder):
        write_part(folder, swarm.world.layout.rank, *_part(swarm), _my_share(folder, swarm))


def _part(swarm: SwarmState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of this rank, as they are now; they do not change when training goes on."""
    layout = swarm.world.layout
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in _own_tensors(swarm).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()  # on the CPU, as torch's
    numpy_state: Any = np.random.get_state()
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": swarm.engine.global_steps,
        "num_particles": layout.num_particles,
        "particle_size": layout.particle_size,
        "sync_mode": swarm.config.sync_mode,
        "wire": swarm.config.wire,
        "turns": swarm.config.turns,
        "zero_stage": swarm.engine.zero_optimization_stage(),
        "model": _model_fingerprint(swarm),
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


def _own_tensors(swarm: SwarmState) -> dict[str, Tensor]:
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


def _my_share(folder: Path, swarm: SwarmState) -> list[Path]:
    """The files of this particle that this rank hashes, and checks when they are loaded."""
    mates = swarm.world.mates_on_this_node
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder / "swarm")
    return files[mates.index(swarm.world.layout.rank) :: len(mates)]


def _model_fingerprint(swarm: SwarmState) -> str:
    if swarm.synchronizer is not None:
        return swarm.synchronizer.shards.fingerprint()
    shapes = [(n, list(getattr(p, "ds_shape", p.shape))) for n, p in swarm.engine.module.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


# -- loading --------------------------------------------------------------------------------

_OR_RESHAPE = ", or load it with reshape=True (train.py: --reshape)"


def load(swarm: SwarmState, folder: Path, tag: str | None = None, *, reshape: bool = False) -> int:
    """Check the whole checkpoint on all ranks, then restore it. Returns the step it was saved at.

    Without a ``tag`` a damaged one is passed over, with a warning, for the next older; what does not fit is an error.

    Args:
        reshape: whether it may have been saved with another number of particles, or of ranks in each.

    Raises:
        CheckpointError: nothing there, damaged, or of another model, rule or number of ranks;
            the engine is untouched.
    """
    swarm.writer.wait()
    name = newest_whole(swarm.world, folder) if tag is None else tag
    with swarm.world.agree("checking the checkpoint"):
        source = find(folder, name)
        reshape = reshape and is_of_another_shape(swarm, source)
        if not reshape:
            record = _read_record(source, swarm, _OR_RESHAPE)
            _check_fits(record, swarm, source, _OR_RESHAPE)
            if tag is not None:  # otherwise it has been done
                check_files(record, source)
            tensors = _read_tensors(source, swarm)
    if reshape:
        return _load_reshaped(swarm, source)
    _load_engine(swarm, source / f"particle_{swarm.particle}", DEEPSPEED_TAG)
    _restore(swarm, record, tensors)
    swarm.metrics.rewind(record["step"])
    return int(record["step"])


def _load_reshaped(swarm: SwarmState, source: Path) -> int:
    with swarm.world.agree("checking the checkpoint"):
        reshaped = Reshaped(swarm, source)
        record = reshaped.record | {"model": _model_fingerprint(swarm)}  # it compares the model itself
        _check_fits(record, swarm, source)
    with swarm.world.agree("reading the checkpoint"):
        tensors = reshaped.read()
        kept = _own_tensors(swarm)
        if reshaped.begins_anew:
            kept = {key: value for key, value in kept.items() if key.startswith("buffer.")}
        _check_kept(tensors, kept, swarm, source)
    with reshaped.in_place_of_the_files():
        _load_engine(swarm, reshaped.folder, DEEPSPEED_TAG)
    if reshaped.begins_anew and swarm.synchronizer is not None:
        swarm.synchronizer.begin_anew(record["step"])
        record["synchronizer"] = swarm.synchronizer.state_dict()
        tensors = _own_tensors(swarm) | tensors
    _restore(swarm, record, tensors)
    swarm.metrics.rewind(record["step"])
    return int(record["step"])


def check_part(swarm: SwarmState, folder: Path) -> None:
    """Whether ``save_part`` has completed ``folder``, and its files are whole. Called on all ranks, before training.

    Raises:
        CheckpointError: as ``load`` does.
    """
    with swarm.world.agree("checking the checkpoint"):
        if not (folder / "swarm").is_dir():
            raise CheckpointError(
                f"{folder}: holds nothing of the swarm, as a checkpoint that was interrupted or was written without "
                "SwarmCallback; move it away and resume from an older one"
            )
        check_files(_read_record(folder, swarm), folder)


def load_part(swarm: SwarmState, folder: Path, *, strict: bool = True) -> int:
    """Restore what ``check_part`` has checked, the engine's own checkpoint included; returns its step.

    Args:
        strict: whether DeepSpeed's checkpoint must hold every parameter; that of an adapter does not.

    Raises:
        CheckpointError: it does not fit, or cannot be loaded.
    """
    with swarm.world.agree("checking the checkpoint"):
        record = _read_record(folder, swarm)
        _check_fits(record, swarm, folder)
        tensors = _read_tensors(folder, swarm)
    _load_engine(swarm, folder, None, strict)
    _restore(swarm, record, tensors)
    return int(record["step"])


def _load_engine(swarm: SwarmState, folder: Path, tag: str | None, strict: bool = True) -> None:
    with weights_only():
        path, _ = swarm.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; the folder is incomplete")


def _read_record(source: Path, swarm: SwarmState, or_reshape: str = "") -> dict[str, Any]:
    path = Path(f"{rank_stem(source, swarm.world.layout.rank)}.json")
    try:
        return parse_record(path)
    except OSError as error:
        present = len(list((source / "swarm").glob("rank_*.json")))
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint holds {present} ranks and this run has "
            f"{swarm.world.layout.world_size}: start as many as it was saved with{or_reshape}"
        ) from error


def _check_fits(record: dict[str, Any], swarm: SwarmState, source: Path, or_reshape: str = "") -> None:
    layout = swarm.world.layout
    now = {
        "num_particles": layout.num_particles,
        "particle_size": layout.particle_size,
        "sync_mode": swarm.config.sync_mode,
        "wire": swarm.config.wire,
        "turns": swarm.config.turns,
        "zero_stage": swarm.engine.zero_optimization_stage(),
        "model": _model_fingerprint(swarm),
    }
    remedies = {
        "num_particles": f"set swarm.particles to that number{or_reshape}",
        "particle_size": f"start that many ranks per particle{or_reshape}",
        "sync_mode": "set swarm.sync_mode to that",
        "wire": "set swarm.wire to that",
        "turns": "set swarm.fragments to that and swarm.streaming to true, or if it is 1 to false",
        "zero_stage": "set zero_optimization.stage to that",
        "model": "build the model, precision and parameter groups it was saved with",
    }
    for key, value in now.items():
        if record[key] != value:
            raise CheckpointError(
                f"{source}: saved with {key} {record[key]}, and this run has {value}; {remedies[key]}, "
                "or start without resuming"
            )
    if len(record["samplers"]) != len(swarm.samplers):
        raise CheckpointError(
            f"{source}: saved with {len(record['samplers'])} samplers, and this run has made "
            f"{len(swarm.samplers)}; call swarm.sampler as often as before, and before swarm.load"
        )
    for sampler, state in zip(swarm.samplers, record["samplers"], strict=True):
        reason = sampler.check(state)
        if reason:
            raise CheckpointError(f"{source}: {reason}; resume with the data it was saved with")


def _read_tensors(source: Path, swarm: SwarmState) -> dict[str, Tensor]:
    path = f"{rank_stem(source, swarm.world.layout.rank)}.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another step_* folder") from error
    _check_kept(tensors, _own_tensors(swarm), swarm, path)
    return tensors


def _check_kept(tensors: dict[str, Tensor], mine: dict[str, Tensor], swarm: SwarmState, path: str | Path) -> None:
    """``tensors``: what was saved; ``mine``: what is to be restored from it."""
    expected = {key: value for key, value in mine.items() if not key.startswith("pending.")}
    found = {key: value for key, value in tensors.items() if not key.startswith(("random.", "pending."))}
    if {key: value.shape for key, value in expected.items()} != {key: value.shape for key, value in found.items()}:
        raise CheckpointError(
            f"{path}: holds the state {sorted(found)}, and swarm.{swarm.config.sync_mode} as configured now "
            f"keeps {sorted(expected)}; resume with the options it was saved with"
        )


def _restore(swarm: SwarmState, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    movement = [tensors[f"pending.{i}"] for i in range(sum(key.startswith("pending.") for key in tensors))]
    if swarm.synchronizer is not None:
        swarm.synchronizer.load_state_dict(record["synchronizer"], movement)
    for key, value in _own_tensors(swarm).items():
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
