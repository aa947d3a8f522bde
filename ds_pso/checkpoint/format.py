"""A checkpoint as it lies on disk: names, records, hashes, and what may be unpickled of it. Knows no swarm."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_pso.errors import CheckpointError, SwarmError
from ds_pso.utils.atomic_io import hash_file

FORMAT = 5
LATEST = "latest"
DEEPSPEED_TAG = "deepspeed"
_STEP = re.compile(r"step_\d{8,}")


def find(folder: Path, tag: str | None = None) -> Path:
    """The folder of checkpoint ``tag``, or of the one that ``latest`` names."""
    if tag is None:
        try:
            tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no checkpoint to resume ({LATEST} cannot be read: {error.strerror}); "
                "check the path, or start without resuming"
            ) from error
    source = folder / tag
    if not _STEP.fullmatch(tag) or not source.is_dir():
        raise CheckpointError(f"{source}: no such checkpoint; name one of the step_* folders in {folder}")
    return source


def pointed_at(folder: Path) -> str | None:
    """What ``latest`` says, if it can be read."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def step_number(name: str) -> int:
    """64 of ``step_00000064``."""
    return int(name.removeprefix("step_"))


def steps_in(folder: Path) -> list[str]:
    """Names of the complete checkpoints in ``folder``, newest first."""
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and not path.is_symlink()]
    return sorted((path.name for path in found if (path / "swarm").is_dir()), key=step_number, reverse=True)


def verified_record(source: Path, rank: int) -> dict[str, Any]:
    """The record of a rank, after checking it and the files that it names. For reading without a swarm."""
    record = record_of(source, rank)
    check_files(record, source)
    return record


def record_of(source: Path, rank: int) -> dict[str, Any]:
    """The record of any rank that took part. Raises CheckpointError unless it lies here and is as it was written."""
    path = Path(f"{rank_stem(source, rank)}.json")
    try:
        return parse_record(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); bring the files of all ranks together in one folder"
        ) from error


def parse_record(path: Path) -> dict[str, Any]:
    """Raises OSError if it cannot be read, CheckpointError if it is not what was written, or of another format."""
    record = read_record(path)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {record.get('format')!r} is not {FORMAT}; use the ds_pso that wrote it")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A record of any format. Raises OSError if it cannot be read, CheckpointError if it is not what was written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another step_* folder") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: damaged (not an object); resume from another step_* folder")
    if record.pop("checksum", None) != checksum(record):
        raise CheckpointError(f"{path}: damaged (checksum differs); resume from another step_* folder")
    return record


def check_files(record: dict[str, Any], source: Path) -> None:
    """Raises CheckpointError unless the files that the record names are as they were written."""
    for name, (size, digest) in record["files"].items():
        path = source / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; resume from another step_* folder")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes instead of {size}, so it was cut short or overwritten; "
                "resume from another step_* folder"
            )
        if hash_file(path) != digest:
            raise CheckpointError(f"{path}: damaged (checksum differs); resume from another step_* folder")


def checksum(record: dict[str, Any]) -> str:
    """Of a record without its own."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """DeepSpeed unpickles its checkpoints; allow its own state classes and plain data, nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    # Numbers: a learning rate computed with NumPy is a NumPy scalar.
    allowed += [np.float64(0).__reduce__()[0], np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, SwarmError):
            raise
        raise CheckpointError(f"DeepSpeed could not load its checkpoint: {str(error).splitlines()[0]}") from error
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def rank_stem(folder: Path, rank: int) -> Path:
    return folder / "swarm" / f"rank_{rank:05d}"
