"""Checkpoints as they lie at an address, such as ``s3://bucket/run``: names, manifests, what is then old.

Layout::

    latest                   name of the newest complete checkpoint
    step_00000064.json       its manifest: every file with size and SHA-256; written when all of them are there
    step_00000064/           the files, by the names that they have in a checkpoint folder

A folder without its manifest was cut short, or is being written or removed. Knows no swarm.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from ds_pso.checkpoint.format import LATEST, is_step, record_checksum, step_number
from ds_pso.errors import CheckpointError
from ds_pso.utils.atomic_io import hash_file, to_disk
from ds_pso.utils.remote_folder import RemoteFolder

FORMAT = 1
Files: TypeAlias = Mapping[str, tuple[int, str]]  # bytes and SHA-256 by path in a checkpoint folder
# Records and tensors of ranks, DeepSpeed's files, the model's configs, DeepSpeed's scripts: nothing else is fetched.
_ALLOWED = re.compile(
    r"swarm/rank_\d{5,}\.(json|safetensors)"
    r"|particle_\d+/(zero_to_(fp32|torch)\.py|(\w[\w.-]*/)*\w[\w.-]*\.(pt|json))",
    re.ASCII,
)


def check_names(files: Files, where: str) -> None:
    """Raise CheckpointError if a checkpoint has no file of such a name."""
    for name in files:
        if not _ALLOWED.fullmatch(name):
            raise CheckpointError(f"{where}: names {name!r}, which is no file of a checkpoint")


def write_manifest(remote: RemoteFolder, name: str, files: Files) -> None:
    """Declare the checkpoint ``name`` complete: all of ``files`` are there."""
    manifest = {"format": FORMAT, "step": step_number(name), "files": dict(files)}
    remote.write(f"{name}.json", json.dumps({**manifest, "checksum": record_checksum(manifest)}).encode())
    remote.write(LATEST, name.encode())


def read_manifest(remote: RemoteFolder, name: str) -> Files:
    """Return the files of the checkpoint ``name``.

    Raises:
        CheckpointError: its manifest is not as it was written, or names what no checkpoint has.
    """
    where = f"{remote.address}/{name}.json"
    try:
        manifest = json.loads(remote.read(f"{name}.json"))
    except ValueError as error:
        raise CheckpointError(f"{where}: damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.pop("checksum", None) != record_checksum(manifest):
        raise CheckpointError(f"{where}: damaged (checksum differs)")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: format {manifest.get('format')!r} is not {FORMAT}; use the ds_pso that wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, list) and len(entry) == 2 for entry in files.values()):
        raise CheckpointError(f"{where}: damaged (no sizes and checksums of files)")
    check_names(files, where)
    return {file: (entry[0], entry[1]) for file, entry in files.items()}


def complete_in(remote: RemoteFolder) -> list[str]:
    """Return the names of the complete checkpoints up to the one that ``latest`` names, newest first."""
    there = remote.names()
    found = sorted(_with_manifest(there), key=step_number, reverse=True)
    latest = remote.read(LATEST).decode(errors="replace").strip() if LATEST in there else ""
    # Later ones are of a run that was gone back behind. What names none was cut short.
    return [name for name in found if not is_step(latest) or step_number(name) <= step_number(latest)]


def _with_manifest(there: list[str]) -> list[str]:
    return [name.removesuffix(".json") for name in there if name.endswith(".json") and is_step(name[:-5])]


def make_room(remote: RemoteFolder, name: str, known: int) -> None:
    """Before the checkpoint ``name`` is written: let nothing of that name, and nothing later, count as one.

    Args:
        known: the step up to which what is there is of this run; 0: it has begun from nothing.

    Raises:
        CheckpointError: something later is there, and of another run.
    """
    there = remote.names()
    later = sorted((other for other in _with_manifest(there) if step_number(other) > known), key=step_number)
    if later and known == 0:
        raise CheckpointError(
            f"it holds {later[-1]} of another run; resume from that, or give this run an address of its own"
        )
    if later:
        remote.write(LATEST, f"step_{known:08d}".encode())
    if f"{name}.json" in there:
        remote.remove(f"{name}.json")


def prune_remote(remote: RemoteFolder, newest: str, keep: int) -> None:
    """Leave ``newest`` and the ``keep - 1`` steps before it, as ``prune`` does; manifests go first."""
    there = remote.names()
    complete = sorted(_with_manifest(there), key=step_number, reverse=True)
    kept = [name for name in complete if step_number(name) <= step_number(newest)][:keep]
    for name in complete:
        if name not in kept:
            remote.remove(f"{name}.json")
    for name in there:
        if is_step(name) and name not in kept:
            remote.remove(name)


def fetch_file(remote: RemoteFolder, name: str, file: str, expected: tuple[int, str], folder: Path, rank: int) -> None:
    """Copy a file of the checkpoint ``name`` into ``folder``, by way of a name of this rank's beside it.

    Raises:
        CheckpointError: it is missing, or not the one that the manifest describes.
    """
    where, target = f"{remote.address}/{name}/{file}", folder / file
    partial = target.with_name(f".{target.name}.{rank}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        remote.get(f"{name}/{file}", partial)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where}: missing at the address") from error
    size, digest = expected
    if partial.stat().st_size != size:
        raise CheckpointError(f"{where}: {partial.stat().st_size} bytes instead of {size}")
    if hash_file(partial) != digest:
        raise CheckpointError(f"{where}: damaged (checksum differs)")
    to_disk(partial)
    os.replace(partial, target)
