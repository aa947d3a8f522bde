"""A sync point on its way: what is kept between its beginning and the step after which the last of it is applied."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Pending:
    """A meeting that goes on while training does.

    ``movement`` holds copies of the fragments' ranges, one after the other, and of the flat buffers as they were at the
    beginning. In the end: how far they shall move, or where they shall be if the particle was not alive; and the mean
    of the buffers, which are statistics (a variance that was corrected could become negative).
    """

    begun: int  # optimizer step
    delay: int  # steps until the last fragment is due
    cut_into: int  # fragments that the shards consist of
    numbers: Sequence[int]  # of those that are on their way
    movement: list[Tensor]
    applied: int = 0  # fragments
    record: dict[str, Any] = field(default_factory=dict)  # to log
    lr_factors: Sequence[float] = ()
    window: Sequence[Any] = ()  # see ``FitnessWindow.state``: that it was emptied of
    apart: Sequence[float] = (0.0, 0.0)
    pace: Sequence[float] = (math.nan, 0.0)  # seconds of a step, and that the sync point before held training up
    arrived_s: list[float] = field(default_factory=list)  # of each fragment, after the beginning
    held_up_s: float = 0.0  # training, to begin it and to apply what has come
    background_s: float = 0.0
    settled_s: float = 0.0  # what ``World.settled_s`` was at the beginning
    waited_s: float = 0.0  # what it has grown by in ``held_up_s``
    arrived: list[threading.Event] = field(default_factory=list)  # of each fragment

    @property
    def fragments(self) -> int:
        """How many are on their way."""
        return len(self.numbers)

    def due(self, fragment: int) -> int:
        """The optimizer step after which it is applied: spread over the delay."""
        return self.begun + math.ceil(self.delay * (fragment + 1) / self.fragments)

    def due_by(self, step: int) -> int:
        """How many fragments are due."""
        return sum(step >= self.due(fragment) for fragment in range(self.fragments))

    def state_dict(self) -> dict[str, Any]:
        """All but the tensors, once the meeting is over; JSON values."""
        numbers = ("begun", "delay", "cut_into", "numbers", "applied", "held_up_s", "background_s")
        names = (*numbers, "record", "lr_factors", "window", "apart", "pace", "arrived_s")
        return {name: getattr(self, name) for name in names}
