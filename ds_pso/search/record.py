"""The record of a search, ``search.json``: settings, what was scored, and in the end the result.

It is written whole after each evaluation, to a temporary name that replaces it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.search.space import Coefficients
from ds_pso.utils.atomic_io import write_atomically

NAME = "search.json"
_FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """A call of the score function.

    Attributes:
        by: who proposed the candidate.
        score: as the function returned it; NaN if it was not finite.
        digest: of the coefficients.
    """

    by: str
    score: float
    digest: str


@dataclass
class Record:
    """A search, from its beginning.

    Attributes:
        path: of ``search.json``.
        settings: what decides which candidates are scored, and how.
        evaluations: in the order of the calls.
        result: None until the search has ended.
        on_disk: whether there is a file at ``path``; else it lies in memory alone.
    """

    path: Path
    settings: Mapping[str, Any]
    evaluations: list[Evaluation] = field(default_factory=list)
    result: Mapping[str, Any] | None = None
    on_disk: bool = True

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> Record:
        """Begin a record in ``folder``, or go on with the one that is there.

        Raises:
            ConfigError: there is one and it is not to be resumed, or the reverse, or it has other settings.
            CheckpointError: it cannot be read.
        """
        path = folder / NAME
        if not resume:
            if path.exists():
                raise ConfigError(f"{path}: is there from another search; go on with --resume, or give another --out")
            return cls(path, settings)
        if not path.exists():
            raise ConfigError(f"--resume: {path} is not there; leave --resume out to begin a search")
        found = _read(path)
        for key, value in settings.items():
            if found["settings"].get(key) != value:
                raise ConfigError(
                    f"{path}: was searched with {key} = {json.dumps(found['settings'].get(key))}, and this run has "
                    f"{json.dumps(value)}; resume with what it began with, or give another --out"
                )
        return cls(path, settings, [_evaluation(item) for item in found["evaluations"]])

    def write(self) -> None:
        """Replace the file, if there is one."""
        if not self.on_disk:
            return
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "evaluations": [asdict(item) | {"score": finite(item.score)} for item in self.evaluations],
            "result": self.result,
        }
        write_atomically(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def discard(self) -> None:
        """Remove the file, if there is one: its scores are of no use, and would stand in the way of the next search."""
        if self.on_disk:
            self.path.unlink(missing_ok=True)


def digest(c: Coefficients) -> str:
    """Return a hash of the exact numbers, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(c + 0.0).tobytes()).hexdigest()[:16]  # -0 is 0


def finite(number: float) -> float | None:
    """Return the number; None, JSON's null, if it is not finite."""
    return number if math.isfinite(number) else None


def table_of(c: Coefficients, experts: Sequence[str], blocks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return coefficients by name of the expert and of the block."""
    return {expert: dict(zip(blocks, row, strict=True)) for expert, row in zip(experts, c.tolist(), strict=True)}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: has the format {found['format']}, and this ds_pso reads {_FORMAT}; begin anew"
            )
        [_evaluation(item) for item in found["evaluations"]]
        dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not the record of a search ({error}); begin anew in another --out"
        ) from error
    return dict(found)


def _evaluation(item: Mapping[str, Any]) -> Evaluation:
    score = math.nan if item["score"] is None else float(item["score"])
    return Evaluation(str(item["by"]), score, str(item["digest"]))
