"""Brings a checkpoint to disk: files, hashes, the rename that completes it, and what is then old. Knows no swarm."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ds_pso.checkpoint.format import LATEST, RankRecord, rank_stem, record_checksum, step_number, steps_in
from ds_pso.errors import CheckpointError, SwarmError
from ds_pso.shards.engine import CheckpointEngine, Engine
from ds_pso.utils.atomic_io import hash_file, replace_folder, to_disk, write_atomically

log = logging.getLogger(__name__)


def write_part(folder: Path, rank: int, record: RankRecord, tensors: dict[str, Tensor], files: Iterable[Path]) -> None:
    """Write the tensors and then the record of a rank, which lists the ``files`` that are there already."""
    stem = rank_stem(folder, rank)
    save_file(tensors, f"{stem}.safetensors")
    listed: dict[str, tuple[int, str]] = {}
    for path in [Path(f"{stem}.safetensors"), *files]:
        to_disk(path)
        listed[str(path.relative_to(folder))] = (path.stat().st_size, hash_file(path))
    whole = {**record, "files": listed}
    write_atomically(Path(f"{stem}.json"), json.dumps({**whole, "checksum": record_checksum(whole)}))


def complete(temporary: Path, final: Path) -> None:
    """All ranks have written: give the folder its name, and let ``latest`` name it."""
    replace_folder(temporary, final)
    write_atomically(final.parent / LATEST, final.name)


def prune(newest: Path, keep: int, spared: str | None = None) -> None:
    """Leave ``newest`` and the ``keep - 1`` steps before it, and the one that is ``spared`` until the next time.

    What an abandoned run left at later steps goes, too, and what a killed one left half written; nothing else.
    """
    folder = newest.parent
    kept = [name for name in steps_in(folder) if step_number(name) <= step_number(newest.name)][:keep]
    old = [folder / name for name in steps_in(folder) if name not in (*kept, spared)]
    try:
        for path in old:  # a killed job must not leave half of one under its name
            os.replace(path, path.with_name(f".{path.name}.old"))
        for path in [*folder.glob(".step_*.old"), *folder.glob(".step_*.tmp")]:
            shutil.rmtree(path)
            log.debug("%s: removed; the newest %d checkpoints stay", path, keep)
    except OSError as error:
        warnings.warn(f"{error.filename}: an old checkpoint cannot be removed ({error.strerror})", stacklevel=2)


# -- from memory, while training goes on -----------------------------------------------------------


class Copies:
    """The files that DeepSpeed wants to write, in memory: the bytes of each, as they would be on disk."""

    def __init__(self) -> None:
        self._files: dict[Path, list[bytes]] = {}
        self._scripts: list[Callable[[], list[Path]]] = []

    def write(self) -> list[Path]:
        """Write the files, and free the memory one by one. Return their paths."""
        paths = list(self._files)
        for path in paths:
            with path.open("wb") as file:
                file.writelines(self._files.pop(path))
        return paths + [path for script in self._scripts for path in script()]

    def add_scripts(self, write: Callable[[str], None], folder: str) -> None:
        """``write`` puts DeepSpeed's scripts for reading its files into ``folder``."""

        def script() -> list[Path]:
            write(folder)
            return list(Path(folder).glob("*.py"))

        self._scripts.append(script)

    def add(self, content: object, path: Path, zipped: bool) -> None:
        """Copy what ``torch.save`` would write of ``content``."""
        chunks = _Chunks()
        crc = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # takes longer than all else, and the file gets a SHA-256
        try:
            torch.save(content, chunks, _use_new_zipfile_serialization=zipped)  # type: ignore[arg-type]
        finally:
            torch.serialization.set_crc32_options(crc)
        self._files[path] = chunks.list


class _Chunks:
    """A file in memory that is never moved as it grows."""

    def __init__(self) -> None:
        self.list: list[bytes] = []

    def write(self, chunk: bytes | memoryview) -> int:
        self.list.append(bytes(chunk))
        return len(chunk)

    def flush(self) -> None:
        pass


class _CopyingEngine:
    """DeepSpeed's checkpoint engine in all but one thing: it saves into memory."""

    def __init__(self, engine: CheckpointEngine, copies: Copies) -> None:
        self._engine, self._copies = engine, copies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def create(self, info: object) -> None:
        pass

    def load(self, path: str, map_location: object = None) -> object:
        return self._engine.load(path, map_location)

    def save(self, state_dict: object, path: str) -> None:
        self._copies.add(state_dict, Path(path), getattr(self._engine, "zipfile_serialization", True))

    def commit(self, info: object) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


@contextlib.contextmanager
def copying(engine: Engine) -> Iterator[Copies]:
    """Inside the block DeepSpeed's ``engine`` saves into memory."""
    copies, real = Copies(), engine.checkpoint_engine
    engine.checkpoint_engine = _CopyingEngine(real, copies)
    engine._copy_recovery_script = functools.partial(copies.add_scripts, engine._copy_recovery_script)
    try:
        yield copies
    finally:
        engine.checkpoint_engine = real
        del engine._copy_recovery_script


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn any error of the block that keeps a checkpoint from being written into a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        if isinstance(error, SwarmError) and type(error) is not SwarmError:
            raise  # it has said already what is wrong
        raise CheckpointError(
            f"{getattr(error, 'filename', None) or path}: cannot write the checkpoint "
            f"({getattr(error, 'strerror', None) or error}); free some space or choose another folder; "
            "the last complete checkpoint is untouched",
        ) from error
