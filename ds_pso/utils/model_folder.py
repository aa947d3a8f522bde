"""Replaces the model in a folder by another one that is complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ds_pso.utils.atomic_io import move_files


@contextlib.contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """An empty folder; at the end of the block its files replace the model in ``folder``. After an error it is gone.

    The old model stays until the new one is complete, and is the one that loads until the last file of the new one has
    moved. Only shards of the same names are neither for a moment: they move one after the other.
    """
    folder = folder.resolve()  # "." has no name
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        written = {path.name for path in temporary.iterdir()}
        move_files(temporary, folder, _decides)
        stale = [path for path in folder.glob("model*.safetensors*") if path.name not in written]
        for path in sorted(stale, key=_decides, reverse=True):  # a single file first: it would be read
            path.unlink()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _decides(path: Path) -> int:
    """Return how much a file decides which weights are read: a single file before an index, and that before shards."""
    names = {"model.safetensors.index.json": 2, "model.safetensors": 3}
    return names.get(path.name, 0 if path.suffix == ".safetensors" else 1)
