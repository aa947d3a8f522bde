"""Checkpoints as somebody may hand them over who wants to harm: with right hashes, and pickles that run code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_pso.checkpoint.format import record_checksum
from ds_pso.utils.atomic_io import hash_file


def seal(source: Path, changed: Path) -> None:
    """Make the records say what one who can write hashes would let them say."""
    for path in sorted(source.glob("swarm/rank_*.json")):
        record = json.loads(path.read_text())
        name = str(changed.relative_to(source))
        if name in record["files"]:
            del record["checksum"]
            record["files"][name] = [changed.stat().st_size, hash_file(changed)]
            path.write_text(json.dumps(record | {"checksum": record_checksum(record)}))


@dataclass
class Evil:
    """A pickle of it creates this file when it is read."""

    path: str

    def __reduce__(self) -> Any:
        return open, (self.path, "w")
