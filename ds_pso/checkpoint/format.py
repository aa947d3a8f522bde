"""A checkpoint as it lies on disk: names, records, hashes, and the classes that may be unpickled. Knows no swarm.

Layout of a checkpoint folder::

    latest                      name of the newest complete checkpoint
    step_00000064/
        particle_0/deepspeed/   DeepSpeed's own checkpoint of particle 0
        particle_0/model/       its Hugging Face config, if it has one
        particle_1/deepspeed/
        swarm/rank_00000.json          this rank's counters, random state, data position, file hashes
        swarm/rank_00000.safetensors   its rule state (velocity, anchor, ...), buffers, torch's random state

Everything is written to ``.step_00000064.tmp`` and renamed when all ranks are done; only then
does ``latest`` move. Where the HF Trainer has written a particle's checkpoint, ``swarm/`` is put beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch

from ds_pso.errors import CheckpointError, SwarmError
from ds_pso.sync.fitness import WindowState
from ds_pso.utils.atomic_io import hash_file

FORMAT = 8
LATEST = "latest"
DEEPSPEED_TAG = "deepspeed"
MODEL = "model"  # a folder beside DeepSpeed's in that of a particle
_STEP = re.compile(r"step_\d{8,}")
_TRAINERS = re.compile(r"checkpoint-\d+")
_TAG_OF_TRAINER = re.compile(r"global_step\d+")


class ShardRecord(TypedDict):
    """Where the elements of a rank's shards belong."""

    model_in: str  # where the rule keeps the model, see ``Rule.model_in``
    segments: list[tuple[str, int, int, int, int]]  # the fields of each ``Segment``


class RandomRecord(TypedDict):
    """The random state of a rank, but for torch's, which is among its tensors."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: list[Any]  # the tuple that NumPy gives


class Identity(TypedDict):
    """The values of a record that must be equal where it is loaded."""

    num_particles: int
    particle_size: int
    sync_mode: str
    wire: str
    turns: int
    zero_stage: int
    model: str  # a fingerprint


class RankRecord(Identity):
    """The JSON file of a rank: counters and positions, and the files that belong to it."""

    format: int
    step: int
    shards: ShardRecord | None  # None: they cannot be read, and a lone particle trains without
    window: WindowState
    synchronizer: dict[str, Any] | None  # ``Synchronizer.state_dict``
    samplers: list[dict[str, int]]
    tensor_parallel: int  # over how many ranks layers are split
    random: RandomRecord | None  # None: a rank that was not there, and begins from its seed
    files: NotRequired[dict[str, tuple[int, str]]]  # bytes and SHA-256 by path; of a record that was written


def find(folder: Path, tag: str | None = None) -> Path:
    """Return the folder of checkpoint ``tag``, or of the one that ``latest`` names."""
    if tag is None:
        try:
            tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no checkpoint to resume ({LATEST} cannot be read: {error.strerror}); "
                "check the path, or start without resuming"
            ) from error
    source = folder / tag
    if not is_step(tag) or not source.is_dir():
        raise CheckpointError(f"{source}: no such checkpoint; name one of the step_* folders in {folder}")
    return source


@dataclass(frozen=True)
class ParticleFolders:
    """The folders of one particle's files.

    Attributes:
        part: holds ``swarm``; the paths in the records of the ranks are relative to it.
        deepspeed: DeepSpeed's files.
        config: the Hugging Face config, if there is one.
    """

    part: Path
    deepspeed: Path
    config: Path


def is_of_trainer(source: Path) -> bool:
    """True if a checkpoint was written by the HF Trainer, which calls it ``checkpoint-64``."""
    return _TRAINERS.fullmatch(source.resolve().name) is not None


def particle_folders(source: Path, particle: int) -> ParticleFolders:
    """Return the folders of a particle in a checkpoint.

    Args:
        source: a ``step_*`` folder; or the Trainer's of any particle.

    Raises:
        CheckpointError: the Trainer's folder of that particle is missing, or does not say where DeepSpeed's files are.
    """
    if not is_of_trainer(source):
        own = source / f"particle_{particle}"
        return ParticleFolders(source, own / DEEPSPEED_TAG, own / MODEL)
    source = source.resolve()
    part = source.parents[1] / f"particle_{particle}" / source.name
    tag = pointed_at(part) or ""
    if not (part / "swarm").is_dir() or not _TAG_OF_TRAINER.fullmatch(tag):
        raise CheckpointError(
            f"{part}: holds nothing of the swarm; give a checkpoint-* folder that a Trainer with SwarmCallback has "
            "completed for every particle"
        )
    return ParticleFolders(part, part / tag, part)


def pointed_at(folder: Path) -> str | None:
    """Return the name in ``latest``, if it can be read."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def is_step(name: str) -> bool:
    """True for a name such as ``step_00000064``."""
    return _STEP.fullmatch(name) is not None


def step_number(name: str) -> int:
    """64 of ``step_00000064``."""
    return int(name.removeprefix("step_"))


def steps_in(folder: Path) -> list[str]:
    """Names of the complete checkpoints in ``folder``, newest first."""
    found = [path for path in folder.glob("step_*") if is_step(path.name) and not path.is_symlink()]
    return sorted((path.name for path in found if (path / "swarm").is_dir()), key=step_number, reverse=True)


def verified_record(source: Path, rank: int) -> RankRecord:
    """Return the record of a rank, after checking it and the files that it names. For reading without a swarm."""
    record = record_of(source, rank)
    check_files(record["files"], source)
    return record


def record_of(source: Path, rank: int) -> RankRecord:
    """Return the record of any rank that took part.

    Raises:
        CheckpointError: it does not lie here, or is not as it was written.
    """
    path = Path(f"{rank_stem(source, rank)}.json")
    try:
        return parse_record(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); bring the files of all ranks together in one folder"
        ) from error


def parse_record(path: Path) -> RankRecord:
    """Read a record of this format.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is not as it was written, or of another format.
    """
    record = read_record(path)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {record.get('format')!r} is not {FORMAT}; use the ds_pso that wrote it")
    return record


def read_record(path: Path) -> RankRecord:
    """Read a record of any format; of another one than ``FORMAT`` only that number can be relied on.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is not as it was written.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another step_* folder") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: damaged (not an object); resume from another step_* folder")
    if record.pop("checksum", None) != record_checksum(record):
        raise CheckpointError(f"{path}: damaged (checksum differs); resume from another step_* folder")
    return cast(RankRecord, record)


def check_files(files: Mapping[str, tuple[int, str]], source: Path) -> None:
    """Raise CheckpointError unless these files, by path in ``source``, have the size and SHA-256 given."""
    for name, (size, digest) in files.items():
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


def record_checksum(record: Mapping[str, object]) -> str:
    """Return the checksum of a record that does not hold it."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]


@contextlib.contextmanager
def plain_data_only() -> Iterator[None]:
    """In the block ``torch.load`` makes nothing but plain data and DeepSpeed's state classes, whatever its caller asks.

    DeepSpeed asks for anything that a pickle may hold, which is code of whoever wrote it. It holds for all threads.

    Raises:
        CheckpointError: a file holds something else; nothing of it was run.
    """
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
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, which is no plain data" if found else str(error).splitlines()[0]
        raise CheckpointError(f"a file of the checkpoint could not be loaded: {what}; no code of it was run") from error
    finally:
        os.environ.pop(names[0], None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """``plain_data_only``, for a block that does nothing but load: whatever fails in it becomes a CheckpointError."""
    try:
        with plain_data_only():
            yield
    except (OSError, RuntimeError, EOFError) as error:
        if isinstance(error, SwarmError):
            raise
        raise CheckpointError(f"DeepSpeed could not load its checkpoint: {str(error).splitlines()[0]}") from error


def rank_stem(folder: Path, rank: int) -> Path:
    """Return the path of a rank's two files without their extension."""
    return folder / "swarm" / f"rank_{rank:05d}"
