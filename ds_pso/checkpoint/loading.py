"""Checks a checkpoint and restores it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ds_pso.checkpoint import fetching
from ds_pso.checkpoint.format import DEEPSPEED_TAG, RankRecord, check_files, find, parse_record, rank_stem, weights_only
from ds_pso.checkpoint.rank_state import identity, model_fingerprint, own_tensors, restore
from ds_pso.checkpoint.reshard import Reshaped, is_of_another_shape
from ds_pso.errors import CheckpointError
from ds_pso.session.session import Session
from ds_pso.shards.engine import tensor_parallel_size

log = logging.getLogger(__name__)

_OR_RESHAPE = ", or load it with reshape=True (train.py: --reshape)"


def load(session: Session, folder: Path, tag: str | None = None, *, reshape: bool = False) -> int:
    """Check the whole checkpoint on all ranks, then restore it. Return the step it was saved at.

    Without a ``tag`` a damaged one is passed over, with a warning, for the next older; what does not fit is an error.

    Args:
        reshape: it may have been saved with another number of particles, or of ranks in each.

    Raises:
        CheckpointError: nothing there, damaged, or of another model, rule or number of ranks;
            the engine is untouched.
    """
    session.writer.wait()
    begin = time.perf_counter()
    or_reshape = "" if session.world.membership.can_fail else _OR_RESHAPE
    coordinator = session.world.coordinator
    if tag is None:
        name = fetching.newest(session, folder, reshape=reshape)
    else:
        fetching.fetch_named(session, folder, name := tag, reshape=reshape)
    with coordinator.agree("checking the checkpoint"):
        source = find(folder, name)
        reshape = reshape and is_of_another_shape(session, source)
    reshape = any(coordinator.gather("shape of the checkpoint", reshape))  # the shares of some may have changed alone
    with coordinator.agree("checking the checkpoint"):
        if not reshape:
            record = _read_record(source, session, or_reshape)
            _check_fits(record, session, source, or_reshape)
            if tag is not None:  # otherwise it has been done
                check_files(record["files"], source)
            tensors = _read_tensors(source, session)
    if reshape:
        record = _load_reshaped(session, source)
    else:
        _load_engine(session, source / f"particle_{session.particle}", DEEPSPEED_TAG)
        restore(session, record, tensors)
    session.metrics.rewind(record["step"])
    if session.is_leader:
        how = ", saved with another number of ranks" if reshape else ""
        log.info("checkpoint %s: loaded in %.1f s%s", source, time.perf_counter() - begin, how)
    return record["step"]


def _load_reshaped(session: Session, source: Path) -> RankRecord:
    with session.world.coordinator.agree("checking the checkpoint"):
        reshaped = Reshaped.open(session, source)
        record = reshaped.record
        record["model"] = model_fingerprint(session)  # the parameters themselves are compared below
        _check_fits(record, session, source)
    with session.world.coordinator.agree("reading the checkpoint"):
        tensors = reshaped.read()
        anew = ("rule.", "wire.") if reshaped.begins_anew else ("wire.",) if reshaped.wire_begins_anew else ()
        kept = {key: value for key, value in own_tensors(session).items() if not key.startswith(anew)}
        _check_kept(tensors, kept, session, source)
    with reshaped.in_place_of_the_files():
        _load_engine(session, reshaped.folder, DEEPSPEED_TAG)
    if reshaped.begins_anew and session.synchronizer is not None:
        session.synchronizer.begin_anew(record["step"])
        record["synchronizer"] = session.synchronizer.state_dict()
        tensors = own_tensors(session) | tensors
    elif reshaped.wire_begins_anew and session.synchronizer is not None:
        session.synchronizer.parts.start_wire()
        tensors = own_tensors(session) | tensors
    restore(session, record, tensors)
    return record


def check_part(session: Session, folder: Path) -> None:
    """Check that ``save_part`` has completed ``folder``, and its files are whole. Called on all ranks, before training.

    Raises:
        CheckpointError: as ``load`` does.
    """
    with session.world.coordinator.agree("checking the checkpoint"):
        if not (folder / "swarm").is_dir():
            raise CheckpointError(
                f"{folder}: holds nothing of the swarm, as a checkpoint that was interrupted or was written without "
                "ds_pso; move it away and resume from an older one"
            )
        check_files(_read_record(folder, session)["files"], folder)


def load_part(session: Session, folder: Path, *, strict: bool = True, load: Callable[[], None] | None = None) -> int:
    """Restore what ``check_part`` has checked, the engine's own checkpoint included. Return its step.

    Args:
        strict: DeepSpeed's checkpoint must hold every parameter; that of an adapter does not.
        load: what loads the engine's checkpoint, and what else was written with it.

    Raises:
        CheckpointError: it does not fit, or cannot be loaded.
    """
    record, tensors = _read_part(session, folder)
    if load is None:
        _load_engine(session, folder, None, strict)
    else:
        with weights_only():
            load()
    restore(session, record, tensors)
    return record["step"]


def restore_part(session: Session, folder: Path) -> None:
    """Restore what ``check_part`` has checked, when the engine's own checkpoint is loaded already."""
    record, tensors = _read_part(session, folder)
    restore(session, record, tensors)
    session.metrics.rewind(record["step"])


def _read_part(session: Session, folder: Path) -> tuple[RankRecord, dict[str, Tensor]]:
    with session.world.coordinator.agree("checking the checkpoint"):
        record = _read_record(folder, session)
        _check_fits(record, session, folder)
        return record, _read_tensors(folder, session)


def _load_engine(session: Session, folder: Path, tag: str | None, strict: bool = True) -> None:
    with weights_only():
        session.loads_engine = True
        try:
            path, _ = session.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        finally:
            session.loads_engine = False
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; the folder is incomplete")


def _read_record(source: Path, session: Session, or_reshape: str = "") -> RankRecord:
    path = Path(f"{rank_stem(source, session.world.layout.rank)}.json")
    try:
        return parse_record(path)
    except OSError as error:
        present = len(list((source / "swarm").glob("rank_*.json")))
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); the checkpoint holds {present} ranks and this run has "
            f"{session.world.layout.world_size}: start as many as it was saved with{or_reshape}"
        ) from error


def _check_fits(record: RankRecord, session: Session, source: Path, or_reshape: str = "") -> None:
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
    for key, value in identity(session).items():
        if saved[key] != value:
            raise CheckpointError(
                f"{source}: saved with {key} {saved[key]}, and this run has {value}; {remedies[key]}, "
                "or start without resuming"
            )
    split = record["tensor_parallel"]
    if split != tensor_parallel_size(session.engine):
        raise CheckpointError(
            f"{source}: saved with tensor_parallel.autotp_size {split}, and this run has "
            f"{tensor_parallel_size(session.engine)}; set it to that, or start without resuming"
        )
    if len(record["samplers"]) != len(session.samplers):
        raise CheckpointError(
            f"{source}: saved with {len(record['samplers'])} samplers, and this run has made "
            f"{len(session.samplers)}; call swarm.sampler as often as before, and before swarm.load"
        )
    for sampler, state in zip(session.samplers, record["samplers"], strict=True):
        reason = sampler.check(state)
        if reason:
            raise CheckpointError(f"{source}: {reason}; resume with the data it was saved with")


def _read_tensors(source: Path, session: Session) -> dict[str, Tensor]:
    path = f"{rank_stem(source, session.world.layout.rank)}.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another step_* folder") from error
    _check_kept(tensors, own_tensors(session), session, path)
    return tensors


def _check_kept(tensors: dict[str, Tensor], mine: dict[str, Tensor], session: Session, path: str | Path) -> None:
    """Raise CheckpointError unless the saved ``tensors`` are those that ``mine`` are to be restored from."""
    # Not what follows from how far training was: on its way, or made with the optimizer's moments.
    expected = {key: value for key, value in mine.items() if not key.startswith(("pending.", "moments."))}
    found = {key: value for key, value in tensors.items() if not key.startswith(("random.", "pending.", "moments."))}
    if {key: value.shape for key, value in expected.items()} != {key: value.shape for key, value in found.items()}:
        raise CheckpointError(
            f"{path}: holds the state {sorted(found)}, and swarm.{session.config.sync_mode} as configured now "
            f"keeps {sorted(expected)}; resume with the options it was saved with"
        )
