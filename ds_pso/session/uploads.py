"""What a rank knows of the copies of checkpoints at ``swarm.remote_checkpoints``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_pso.utils.background_task import Task


@dataclass
class Uploads:
    """The upload that goes on beside training: at most one.

    Attributes:
        known: the step up to which what lies at the address is of this run; 0: it has begun from nothing.
        passed_over: the newest checkpoint that was not uploaded because one was on its way, and how many to keep.
    """

    known: int = 0
    passed_over: tuple[Path, int | None] | None = None
    _task: Task | None = None
    _name: str = ""

    def follow(self, name: str, task: Task | None) -> None:
        """Remember what uploads the checkpoint ``name``; None: it is done already."""
        self._name, self._task = name, task

    @property
    def on_its_way(self) -> str | None:
        """The name of the checkpoint whose local files are still needed."""
        return self._name if self._task is not None and self._task.is_alive else None

    def wait(self, timeout_s: float) -> None:
        """Wait until nothing is on its way, or the time is over."""
        if self._task is not None:
            self._task.join(timeout_s)
