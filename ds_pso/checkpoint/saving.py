"""Saves a checkpoint of a running swarm."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from ds_pso.checkpoint.format import DEEPSPEED_TAG, MODEL
from ds_pso.checkpoint.rank_state import taken
from ds_pso.checkpoint.uploading import begin_upload
from ds_pso.checkpoint.writer import Copies, as_checkpoint_error, complete, copying, prune, write_part
from ds_pso.distributed.coordinator import Coordinator
from ds_pso.errors import ConfigError
from ds_pso.session.session import Session
from ds_pso.utils.wrappers import unwrapped

log = logging.getLogger(__name__)


def save(
    session: Session, folder: Path, keep: int | None = None, *, background: bool = False, upload: bool = True
) -> Path:
    """Write ``folder/step_<n>`` and move ``latest`` to it. Called on all ranks, between steps.

    Args:
        keep: number of the newest to leave; None: all.
        background: return when the state is copied to main memory; the rest happens beside training.
        upload: copy it to ``swarm.remote_checkpoints``, if that is set, when it is complete.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written, now or for the one before, that was
            written in the background; what was there stays.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"swarm.save keep = {keep}: must be at least 1, or None to keep all")
    session.writer.wait()
    begin = time.perf_counter()
    name = f"step_{session.engine.global_steps:08d}"
    temporary, final = folder / f".{name}.tmp", folder / name
    particle = temporary / f"particle_{session.particle}"
    world = session.world
    with as_checkpoint_error(folder):
        leads = world.coordinator.leads_disk(folder)
    with world.coordinator.agree("starting a checkpoint"), as_checkpoint_error(temporary):
        if leads:
            log.info("checkpoint %s: begun%s", final, " in the background" if background else "")
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "swarm").mkdir(parents=True, exist_ok=True)
    with world.coordinator.agree("starting a checkpoint"), as_checkpoint_error(temporary):
        save_model_config(session, particle / MODEL)
    saving = copying(session.engine) if background else contextlib.nullcontext(Copies())
    # Not inside agree: its barriers would leave the others waiting while this rank waits for them.
    with as_checkpoint_error(temporary), saving as copies:
        session.engine.save_checkpoint(str(particle), tag=DEEPSPEED_TAG, save_latest=False)
    with world.coordinator.agree("copying a checkpoint"):  # nobody writes before all have seen which files are there
        record, tensors = taken(session)
        files = _my_share(particle, session)

    def finish(coordinator: Coordinator) -> None:
        with coordinator.agree("writing a checkpoint"), as_checkpoint_error(temporary):
            write_part(temporary, world.layout.rank, record, tensors, [*files, *copies.write()])
        with coordinator.agree("completing a checkpoint"), as_checkpoint_error(final):
            if leads:
                complete(temporary, final)
                log.info("checkpoint %s: complete after %.1f s", final, time.perf_counter() - begin)
        if leads and keep is not None:
            prune(final, keep, session.uploads.on_its_way)
        if upload:
            begin_upload(session, coordinator, final, keep)

    if background:
        session.writer.follow(world.coordinator.beside(finish))
    else:
        finish(world.coordinator)
    return final


def save_part(session: Session, folder: Path) -> None:
    """Add the swarm's part to ``folder``, into which a trainer has just written its checkpoint of this particle.

    Called on all ranks, between steps; a rank's JSON, its last file, says what the folder must hold.

    Raises:
        CheckpointError: as ``save`` does.
    """
    with session.world.coordinator.agree("starting a checkpoint"), as_checkpoint_error(folder):
        (folder / "swarm").mkdir(exist_ok=True)
    with session.world.coordinator.agree("completing a checkpoint"), as_checkpoint_error(folder):
        write_part(folder, session.world.layout.rank, *taken(session), _my_share(folder, session))


def _my_share(folder: Path, session: Session) -> list[Path]:
    """Return the files of this particle that this rank hashes, and checks when they are loaded."""
    local_ranks = session.world.coordinator.local_ranks_on_this_node
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder / "swarm")
    return files[local_ranks.index(session.world.layout.rank) :: len(local_ranks)]


def save_model_config(session: Session, folder: Path) -> None:
    """Write the configs that a Hugging Face model and peft's adapter need beside weights; for other modules nothing.

    Called on all ranks; the first one of the particle writes.
    """
    module: Any = unwrapped(session.engine.module)
    base: Any = unwrapped(module.get_base_model()) if hasattr(module, "get_base_model") else module  # of a peft model
    config: Any = getattr(base, "config", None)
    # Other libraries' modules have a save_pretrained, too, or a config of their own kind.
    if session.world.layout.shard_rank != 0 or not (
        hasattr(base, "save_pretrained") and hasattr(config, "to_json_file")
    ):
        return
    adapters = getattr(module, "peft_config", {})
    if adapters and (base is module or list(adapters) != ["default"]):
        return  # several, or without a peft model around: not written anew by ``export.offline``
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.architectures = [type(base).__name__]
    config.to_json_file(folder / "config.json")
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.to_json_file(folder / "generation_config.json")
    if adapters:
        adapters["default"].save_pretrained(folder)
