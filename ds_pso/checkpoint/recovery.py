"""Finds the checkpoint to resume from when none is named: the newest that is whole, on all ranks alike."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from ds_pso.checkpoint.format import (
    FORMAT,
    LATEST,
    check_files,
    pointed_at,
    rank_stem,
    read_record,
    step_number,
    steps_in,
)
from ds_pso.distributed.coordinator import Coordinator
from ds_pso.errors import CheckpointError

log = logging.getLogger(__name__)


def find_whole(coordinator: Coordinator, folder: Path) -> tuple[str | None, list[str]]:
    """Look for the checkpoint that ``latest`` names, or for the next older one if a file of that is damaged.

    Called on all ranks, which share the work of reading every file. Whether it fits this run is not asked.

    Returns:
        Its name, or None; and what is wrong with those that it is used instead of.
    """
    mine: tuple[str | None, list[str]] = (pointed_at(folder), steps_in(folder))
    seen = coordinator.gather("looking for checkpoints", mine)  # without a shared disk each sees its own
    names = sorted({name for _, steps in seen for name in steps}, key=step_number, reverse=True)
    latest = max((name for name, _ in seen if name is not None and name in names), key=step_number, default=None)
    if not names:
        return None, []
    wrong = [] if latest else [f"{folder / LATEST}: missing, or names no checkpoint"]
    for name in names:
        if latest and step_number(name) > step_number(latest):
            continue  # of a run that was gone back behind
        reason = damage(coordinator, folder / name)
        if reason is None:
            return name, wrong
        wrong.append(reason)
    return None, wrong


def or_error(coordinator: Coordinator, folder: Path, name: str | None, wrong: list[str]) -> str:
    """Return the name that was found, with a warning if others are damaged.

    Raises:
        CheckpointError: none was; it lists what is wrong with each. All ranks raise it.
    """
    if name is None and not wrong:
        raise CheckpointError(
            f"{folder}: no checkpoint to resume (it holds no step_* folder that is complete); check the path, or start "
            "without resuming",
            agreed=True,
        )
    if name is None:
        raise CheckpointError(f"{folder}: no checkpoint to resume is whole: {'; '.join(wrong)}", agreed=True)
    if wrong and coordinator.is_leader:
        warnings.warn(f"{'; '.join(wrong)}; resuming from {folder / name} instead", stacklevel=5)
    return name


def damage(coordinator: Coordinator, source: Path) -> str | None:
    """Return the damage that the first rank to see any has seen; None if the checkpoint is whole.

    The ranks of the checkpoint need not be those of this run.
    """
    reason = None
    try:
        for rank in range(coordinator.layout.rank, _ranks_of(source), coordinator.layout.world_size):
            check_files(read_record(Path(f"{rank_stem(source, rank)}.json"))["files"], source)
    except CheckpointError as error:
        reason = str(error).rpartition("; ")[0]  # without the remedy, which is what follows here
    except OSError as error:
        reason = f"{error.filename or source}: cannot be read ({error.strerror})"
    found: list[str | None] = coordinator.gather("checking a checkpoint", reason)
    return next((reason for reason in found if reason is not None), None)


def _ranks_of(source: Path) -> int:
    """Return the number of ranks that wrote it, from the first record that can be read."""
    reason = CheckpointError(f"{source}: missing; resume from another step_* folder")
    for path in sorted((source / "swarm").glob("rank_*.json")):
        try:
            record = read_record(path)
            if record.get("format") != FORMAT:
                return 0  # not damaged; loading it says what is wrong
            return int(record["num_particles"] * record["particle_size"])
        except CheckpointError as error:
            reason = error
    raise reason
