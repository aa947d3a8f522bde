"""Files and folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without it
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; at the end of the block it replaces ``path``. After an error it is gone.

    A reader sees the old content or the new one, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write bytes; it replaces ``path`` as ``replacing_file`` does."""
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        yield file


def write_atomically(path: Path, text: str) -> None:
    """Replace the text of a file, as ``replacing_file`` does."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``; an older ``final`` is kept until the new one is in place.

    The files in it must be on disk already; the names of all are when this returns.
    """
    for path in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        to_disk(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_files(source: Path, target: Path, rank: Callable[[Path], int]) -> None:
    """Move files into ``target``, over those of the same names, and remove ``source``.

    All are on disk before the first one moves. They move one at a time, those of the lowest rank first; that order also
    holds after a power cut.
    """
    paths = sorted((path for path in source.rglob("*") if path.is_file()), key=rank)
    for path in paths:
        to_disk(path)
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
        to_disk(place.parent)
    shutil.rmtree(source)
