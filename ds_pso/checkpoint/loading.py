"""Checks a checkpoint and restores it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ds_pso.checkpoint.format import DEEPSPEED_TAG, RankRecord, check_files, find, parse_record, rank_stem, weights_only
from ds_pso.checkpoint.rank_state import identity, model_fingerprint, own_tensors, restore
from ds_pso.checkpoint.recovery import newest_whole
from ds_pso.checkpoint.reshard import Reshaped, is_of_another_shape
from ds_pso.errors import CheckpointError
from ds_pso.session.parts import SwarmState

log = logging.getLogger(__name__)

_OR_RESHAPE = ", or load it with reshape=True (train.py: --reshape)"


def load(swarm: SwarmState, folder: Path, tag: str | None = None, *, reshape: bool = False) -> int:
    """Check the whole checkpoint on all ranks, then restore it. Return the step it was saved at.

    Without a ``tag`` a damaged one is passed over, with a warning, for the next older; what does not fit is an error.

    Args:
        reshape: it may have been saved with another number of particles, or of ranks in each.

    Raises:
        CheckpointError: nothing there, damaged, or of another model, rule or number of ranks;
            the engine is untouched.
    """
    swarm.writer.wait()
    begin = time.perf_counter()
    name = newest_whole(swarm.world, folder) if tag is None else tag
    with swarm.world.agree("checking the checkpoint"):
        source = find(folder, name)
        reshape = reshape and is_of_another_shape(swarm, source)
        if not reshape:
            record = _read_record(source, swarm, _OR_RESHAPE)
            _check_fits(record, swarm, source, _OR_RESHAPE)
            if tag is not None:  # otherwise it has been done
                check_files(record["files"], source)
            tensors = _read_tensors(source, swarm)
    if reshape:
        record = _load_reshaped(swarm, source)
    else:
        _load_engine(swarm, source / f"particle_{swarm.particle}", DEEPSPEED_TAG)
        restore(swarm, record, tensors)
    swarm.metrics.rewind(record["step"])
    if swarm.is_leader:
        how = ", saved with another number of ranks" if reshape else ""
        log.info("checkpoint %s: loaded in %.1f s%s", source, time.perf_counter() - begin, how)
    return record["step"]


def _load_reshaped(swarm: SwarmState, source: Path) -> RankRecord:
    with swarm.world.agree("checking the checkpoint"):
        reshaped = Reshaped.open(swarm, source)
        record = reshaped.record
        record["model"] = model_fingerprint(swarm)  # the parameters themselves are compared below
        _check_fits(record, swarm, source)
    with swarm.world.agree("reading the checkpoint"):
        tensors = reshaped.read()
        kept = own_tensors(swarm)
        if reshaped.begins_anew:
            kept = {key: value for key, value in kept.items() if key.startswith("buffer.")}
        _check_kept(tensors, kept, swarm, source)
    with reshaped.in_place_of_the_files():
        _load_engine(swarm, reshaped.folder, DEEPSPEED_TAG)
    if reshaped.begins_anew and swarm.synchronizer is not None:
        swarm.synchronizer.begin_anew(record["step"])
        record["synchronizer"] = swarm.synchronizer.state_dict()
        tensors = own_tensors(swarm) | tensors
    restore(swarm, record, tensors)
    return record


def check_part(swarm: SwarmState, folder: Path) -> None:
    """Check that ``save_part`` has completed ``folder``, and its files are whole. Called on all ranks, before training.

    Raises:
        CheckpointError: as ``load`` does.
    """
    with swarm.world.agree("checking the checkpoint"):
        if not (folder / "swarm").is_dir():
            raise CheckpointError(
                f"{folder}: holds nothing of the swarm, as a checkpoint that was interrupted or was written without "
                "SwarmCallback; move it away and resume from an older one"
            )
        check_files(_read_record(folder, swarm)["files"], folder)


def load_part(swarm: SwarmState, folder: Path, *, strict: bool = True) -> int:
    """Restore what ``check_part`` has checked, the engine's own checkpoint included. Return its step.

    Args:
        strict: DeepSpeed's checkpoint must hold every parameter; that of an adapter does not.

    Raises:
        CheckpointError: it does not fit, or cannot be loaded.
    """
    with swarm.world.agree("checking the checkpoint"):
        record = _read_record(folder, swarm)
        _check_fits(record, swarm, folder)
        tensors = _read_tensors(folder, swarm)
    _load_engine(swarm, folder, None, strict)
    restore(swarm, record, tensors)
    return record["step"]


def _load_engine(swarm: SwarmState, folder: Path, tag: str | None, strict: bool = True) -> None:
    with weights_only():
        path, _ = swarm.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; the folder is incomplete")


def _read_record(source: Path, swarm: SwarmState, or_reshape: str = "") -> RankRecord:
    path = Path(f"{rank_stem(source, swarm.world.layout.rank)}.json")
    try:
        return parse_record(path)
    except OSError as error:
        present = len(list((source / "swarm").glob("rank_*.json")))
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint holds {present} ranks and this run has "
            f"{swarm.world.layout.world_size}: start as many as it was saved with{or_reshape}"
        ) from error


def _check_fits(record: RankRecord, swarm: SwarmState, source: Path, or_reshape: str = "") -> None:
    remedies = {
        "num_particles": f"set swarm.particles to that number{or_reshape}",
        "particle_size": f"start that many ranks per particle{or_reshape}",
        "sync_mode": "set swarm.sync_mode to that",
        "wire": "set swarm.wire to that",
        "turns": "set swarm.fragments to that and swarm.streaming to true, or if it is 1 to false",
        "zero_stage": "set zero_optimization.stage to that",
        "model": "build the model, precision and parameter groups it was saved with",
    }
    saved: Mapping[str, object] = record
    for key, value in identity(swarm).items():
        if saved[key] != value:
            raise CheckpointError(
                f"{source}: saved with {key} {saved[key]}, and this run has {value}; {remedies[key]}, "
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
    _check_kept(tensors, own_tensors(swarm), swarm, path)
    return tensors


def _check_kept(tensors: dict[str, Tensor], mine: dict[str, Tensor], swarm: SwarmState, path: str | Path) -> None:
    """Raise CheckpointError unless the saved ``tensors`` are those that ``mine`` are to be restored from."""
    expected = {key: value for key, value in mine.items() if not key.startswith("pending.")}
    found = {key: value for key, value in tensors.items() if not key.startswith(("random.", "pending."))}
    if {key: value.shape for key, value in expected.items()} != {key: value.shape for key, value in found.items()}:
        raise CheckpointError(
            f"{path}: holds the state {sorted(found)}, and swarm.{swarm.config.sync_mode} as configured now "
            f"keeps {sorted(expected)}; resume with the options it was saved with"
        )
