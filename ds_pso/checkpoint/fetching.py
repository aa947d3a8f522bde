"""Brings checkpoints back from ``swarm.remote_checkpoints`` into a local folder, if it holds a newer one."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_pso.checkpoint.format import is_step, step_number, steps_in
from ds_pso.checkpoint.recovery import damage, find_whole, or_error
from ds_pso.checkpoint.remote import Files, complete_in, fetch_file, read_manifest
from ds_pso.checkpoint.uploading import address_of
from ds_pso.checkpoint.writer import complete
from ds_pso.errors import CheckpointError, SwarmError
from ds_pso.session.session import Session
from ds_pso.utils.atomic_io import replace_folder
from ds_pso.utils.remote_folder import RemoteFolder

log = logging.getLogger(__name__)


def newest(session: Session, folder: Path, *, reshape: bool) -> str:
    """Return the name of the newest checkpoint in ``folder`` that is whole; a newer one is fetched into it first.

    Called on all ranks.

    Args:
        reshape: each disk needs the files of all ranks, and not only those of the ranks beside it.

    Raises:
        CheckpointError: there is none, or the address cannot be read. All ranks raise it.
    """
    coordinator, address = session.world.coordinator, address_of(session)
    name, wrong = find_whole(coordinator, folder)
    if address is not None:
        candidates = _told_by_leader(session, address, folder, complete_in)
        if not candidates and name is not None and session.is_leader:
            warnings.warn(f"{address}: holds no checkpoint; resuming from {folder} alone", stacklevel=4)
        for candidate in candidates:
            if name is not None and step_number(candidate) <= step_number(name):
                break
            reason = _fetch(session, address, candidate, folder, complete, reshape=reshape)
            if reason is None:
                return candidate
            if session.is_leader:
                warnings.warn(f"{reason}; looking for an older checkpoint", stacklevel=4)
    return or_error(coordinator, folder, name, wrong)


def fetch_named(session: Session, folder: Path, name: str, *, reshape: bool) -> None:
    """Fetch the checkpoint ``name`` into ``folder``, unless it is there and whole, or not at the address either.

    Raises:
        CheckpointError: it is damaged, or the address cannot be read.
    """
    address, coordinator = address_of(session), session.world.coordinator
    if address is None:
        return
    is_here = all(coordinator.gather("looking for a checkpoint", name in steps_in(folder)))
    if is_here and damage(coordinator, folder / name) is None:
        return
    if is_step(name) and f"{name}.json" in _told_by_leader(session, address, folder, RemoteFolder.names):
        reason = _fetch(session, address, name, folder, replace_folder, reshape=reshape)
        if reason is not None:
            raise CheckpointError(f"{reason}; name another checkpoint", agreed=True)


def _fetch(
    session: Session, address: str, name: str, folder: Path, name_it: Callable[[Path, Path], None], *, reshape: bool
) -> str | None:
    """Fetch a checkpoint, and ``name_it`` when all ranks have what they need. Return the damage, if there is any."""
    coordinator, begin = session.world.coordinator, time.perf_counter()
    temporary, final = folder / f".{name}.tmp", folder / name
    leads = coordinator.leads_disk(folder)
    with _remote(session, address, folder):
        if leads:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    reason = None
    with _remote(session, address, folder) as remote:
        try:
            files = read_manifest(remote, name)
            for file in files if reshape and leads else [] if reshape else _needed_here(session, files):
                fetch_file(remote, name, file, files[file], temporary, session.world.layout.rank)
        except CheckpointError as error:
            reason = str(error)
    reasons = coordinator.gather("fetching a checkpoint", reason)
    reason = next((found for found in reasons if found is not None), None)
    with _remote(session, address, folder):
        if leads and reason is None:
            name_it(temporary, final)
        elif leads:
            shutil.rmtree(temporary, ignore_errors=True)
    if reason is None and session.is_leader:
        log.info("checkpoint %s: fetched from %s in %.1f s", final, address, time.perf_counter() - begin)
    return reason


def _needed_here(session: Session, files: Files) -> list[str]:
    """Return what this rank fetches: its own, and its part of what the ranks of its particle share on this machine."""
    layout, local_ranks = session.world.layout, session.world.coordinator.local_ranks_on_this_node
    shared = sorted(name for name in files if name.startswith(f"particle_{layout.particle}/"))
    own = [name for name in files if name.startswith(f"swarm/rank_{layout.rank:05d}.")]
    return own + shared[local_ranks.index(layout.rank) :: len(local_ranks)]


def _told_by_leader(
    session: Session, address: str, folder: Path, ask: Callable[[RemoteFolder], list[str]]
) -> list[str]:
    """Return the answer of one rank on all of them, so that they decide alike."""
    names: list[str] = []
    with _remote(session, address, folder) as remote:
        if session.is_leader:
            names = ask(remote)
    return session.world.coordinator.gather("what lies at the address", names)[0]


@contextlib.contextmanager
def _remote(session: Session, address: str, folder: Path) -> Iterator[RemoteFolder]:
    """A block on all ranks that reads from the address: if it fails on any, an error on all."""
    with session.world.coordinator.agree("reading a remote checkpoint"):
        try:
            yield RemoteFolder(address)
        except SwarmError:
            raise
        except Exception as error:  # whatever the library raises
            raise CheckpointError(
                f"{address}: the checkpoint cannot be fetched ({str(error) or type(error).__name__}); check the "
                f"address, its credentials and the space in {folder}, or remove swarm.remote_checkpoints to resume "
                "from the disk alone"
            ) from error
