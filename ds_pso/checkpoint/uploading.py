"""Copies complete checkpoints to ``swarm.remote_checkpoints``, beside training, which does not fail if that fails."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from ds_pso.checkpoint.format import rank_stem, read_record, step_number
from ds_pso.checkpoint.remote import Files, check_names, make_room, prune_remote, write_manifest
from ds_pso.distributed.coordinator import Coordinator
from ds_pso.errors import CheckpointError
from ds_pso.session.session import Session
from ds_pso.session.uploads import Uploads
from ds_pso.utils.atomic_io import hash_file
from ds_pso.utils.remote_folder import RemoteFolder

log = logging.getLogger(__name__)


def address_of(session: Session) -> str | None:
    """Return the address of this launch's checkpoints: an elastic particle has a folder of its own, as on disk."""
    address = session.config.remote_checkpoints
    own = session.world.membership.folder(Path())
    return address if address is None or own == Path() else f"{address.rstrip('/')}/{own}"


def begin_upload(session: Session, coordinator: Coordinator, final: Path, keep: int | None) -> None:
    """Copy a complete checkpoint to the address, if there is one, beside training. Called alike on all ranks.

    While another one is on its way it is passed over; the newest of those follows at the end.
    """
    uploads, address = session.uploads, address_of(session)
    if address is None:
        return
    busy = any(coordinator.gather("looking for an upload", uploads.on_its_way is not None))
    uploads.passed_over = (final, keep) if busy else None
    if busy:
        log.info("%s: not uploaded, as %s is still on its way", final.name, uploads.on_its_way)
    else:
        task = coordinator.beside(lambda beside: _upload(beside, uploads, address, final, keep))
        uploads.follow(final.name, task)


def finish_uploads(session: Session) -> None:
    """Wait for the upload of the newest checkpoint, for ``timeout_s`` at most. Called on all ranks."""
    uploads, timeout_s = session.uploads, session.config.timeout_s
    begin = time.monotonic()
    # Ranks whose upload has ended may be waiting for this one already, and no longer than that.
    uploads.wait(timeout_s if uploads.passed_over is None else timeout_s / 2)
    if uploads.passed_over is not None:
        begin_upload(session, session.world.coordinator, *uploads.passed_over)
        uploads.wait(max(0.0, begin + timeout_s - time.monotonic()))
    if session.is_leader and uploads.on_its_way is not None:
        warnings.warn(
            f"{address_of(session)}/{uploads.on_its_way}: the upload was not complete {timeout_s:g} s after training, "
            "and is broken off; raise swarm.timeout_s",
            stacklevel=4,
        )


def _upload(coordinator: Coordinator, uploads: Uploads, address: str, final: Path, keep: int | None) -> None:
    begin = time.perf_counter()
    try:
        with coordinator.agree("beginning an upload"):
            remote = RemoteFolder(address)
            own = _own_files(final, coordinator.layout.rank)
            if coordinator.is_leader:
                make_room(remote, final.name, uploads.known)
        listed = coordinator.gather("the files of an upload", own)
        files: dict[str, tuple[int, str]] = {}
        mine = dict(own)
        for rank, names in zip(coordinator.ranks, listed, strict=True):
            for name in names.keys() - files.keys():  # ranks that share a disk may have listed the same
                files[name] = names[name]
                if rank != coordinator.layout.rank:
                    mine.pop(name, None)
        with coordinator.agree("uploading a checkpoint"):
            for name in mine:
                remote.put(final / name, f"{final.name}/{name}")
            if _own_files(final, coordinator.layout.rank) != own:
                raise CheckpointError(f"{final}: was saved anew meanwhile")
        with coordinator.agree("completing an upload"):
            if coordinator.is_leader:
                uploads.known = max(uploads.known, step_number(final.name))
                write_manifest(remote, final.name, files)
    except Exception as error:  # whatever the library raises, training goes on
        if coordinator.is_leader:
            warnings.warn(
                f"{address}/{final.name}: not uploaded ({str(error) or type(error).__name__}); the checkpoint on disk "
                "is complete, and the next one will be tried",
                stacklevel=2,
            )
        return
    if coordinator.is_leader:
        log.info("checkpoint %s/%s: uploaded after %.1f s", address, final.name, time.perf_counter() - begin)
        _prune(remote, final.name, keep)


def _own_files(final: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Return what a rank has written, its record included."""
    record = Path(f"{rank_stem(final, rank)}.json")
    files: Files = read_record(record)["files"] | {
        str(record.relative_to(final)): (record.stat().st_size, hash_file(record))
    }
    check_names(files, str(final))
    return dict(files)


def _prune(remote: RemoteFolder, newest: str, keep: int | None) -> None:
    try:
        if keep is not None:
            prune_remote(remote, newest, keep)
    except Exception as error:
        warnings.warn(f"{remote.address}: an old checkpoint cannot be removed ({error})", stacklevel=2)
