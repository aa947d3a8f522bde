"""The optimizer steps after which there is a sync point."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ds_pso.utils.strict_model import StrictModel

NEVER = 2**53  # an interval that no training reaches
_OF_TYPE = {
    "fixed": {"warmup_steps"},
    "adaptive": {"warmup_steps", "min_interval", "max_interval", "drift", "compute_share"},
    "wall_time": {"warmup_steps", "min_interval", "max_interval", "seconds"},
}


class ScheduleConfig(StrictModel):
    """``swarm.schedule``"""

    type: Literal["fixed", "adaptive", "wall_time"] = Field(
        default="fixed",
        description="The interval stays `sync_interval`; or begins with it and follows the drift between the "
        "particles; or follows the clock.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Sync after each of the first so many optimizer steps.")
    min_interval: int = Field(default=1, ge=1, description="Fewest steps between two sync points, after the warm-up.")
    max_interval: int = Field(default=1024, ge=1, description="Most steps between two sync points.")
    drift: float = Field(
        default=0.1,
        gt=0,
        description="`adaptive`: how far the particles shall be apart at a sync point: root mean square of their "
        "distances to what they receive, relative to its norm.",
    )
    compute_share: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="`adaptive`: never sync so often that less than this share of the time is left for training; "
        "0: however long it takes.",
    )
    seconds: float = Field(
        default=60.0, gt=0, description="`wall_time`: training time between two sync points, of the slowest particle."
    )

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        foreign = self.model_fields_set - _OF_TYPE[self.type] - {"type"}
        if foreign:
            raise ValueError(f'"{min(foreign)}" has no meaning with "type": "{self.type}"; remove it')
        if self.min_interval > self.max_interval:
            raise ValueError(
                f"min_interval = {self.min_interval} is more than max_interval = {self.max_interval}; lower it"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Return what has a meaning with this type, every default filled in, as JSON types."""
        return self.model_dump(mode="json", include={"type"} | _OF_TYPE[self.type])


@dataclass(frozen=True)
class Observed:
    """Measurements of a sync; the same numbers on every rank of the swarm."""

    drift: float  # see ScheduleConfig.drift
    step_s: float  # seconds of an optimizer step, of the slowest particle; NaN if not known
    held_up_s: float  # how long the sync point before held training up, of the particle that others waited for


class Schedule:
    """A fixed interval, after a warm-up in which the particles sync after every step.

    Every rank asks with the same numbers and gets the same answers; nothing here communicates.
    """

    def __init__(self, options: ScheduleConfig, interval: int, total_steps: int | None) -> None:
        self.options = options
        self.interval = interval
        self.total_steps = total_steps
        self._begun = 0  # the step of the last sync

    def is_due(self, step: int) -> bool:
        """True if there is a sync point after optimizer step ``step``, counted from 1."""
        return step <= self.options.warmup_steps or step % self.interval == 0

    def next_after(self, step: int) -> int:
        """The first step after ``step`` that is due."""
        if step < self.options.warmup_steps:
            return step + 1
        return (step // self.interval + 1) * self.interval

    @property
    def last(self) -> int | None:
        """The last step of the training that is due; None if its length is not known, 0 if there is none."""
        if self.total_steps is None:
            return None
        return max(
            0, min(self.options.warmup_steps, self.total_steps), self.total_steps // self.interval * self.interval
        )

    @property
    def count(self) -> int | None:
        """How many steps of the whole training are due; None if nobody knows."""
        if self.total_steps is None:
            return None
        warmup = min(self.options.warmup_steps, self.total_steps)
        return warmup + self.total_steps // self.interval - warmup // self.interval

    def progress(self, step: int) -> float | None:
        """From 0 to 1 at the last step that is due; None if nobody knows how long training is."""
        return min(1.0, step / self.last) if self.last else None

    def in_warmup(self, step: int) -> bool:
        """True while the particles sync after every step."""
        return step <= self.options.warmup_steps

    def fragment_at(self, step: int, fragments: int) -> int:
        """Return the number of the fragment whose turn it is after ``step``, where they sync one after another."""
        return (step // self.interval - 1) % fragments

    def begin(self, step: int) -> float | None:
        """Take note that a sync begins after ``step``; return ``progress`` there."""
        self._begun = step
        return self.progress(step)

    def observe(self, observed: Observed) -> None:
        """Learn from the last sync."""

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begun = state["begun"]


class VaryingSchedule(Schedule, ABC):
    """The interval follows what sync points show; the last step of the training is due whatever it is."""

    def __init__(self, options: ScheduleConfig, interval: int, total_steps: int | None) -> None:
        super().__init__(options, interval, total_steps)
        self._wanted = self._within(interval)  # not whole, so that it can grow from 1
        self._whole = False  # whether the last interval was as long as wanted

    @abstractmethod
    def _wish(self, observed: Observed) -> float:
        """The next interval, whatever its limits."""

    def _within(self, interval: float) -> float:
        return min(max(interval, self.options.min_interval), self.options.max_interval)

    def is_due(self, step: int) -> bool:
        return step >= self.next_after(self._begun)

    def next_after(self, step: int) -> int:
        if step < self.options.warmup_steps:
            return step + 1
        next_step = max(self._begun + round(self._wanted), step + 1)
        return next_step if self.total_steps is None or step >= self.total_steps else min(next_step, self.total_steps)

    @property
    def last(self) -> int | None:
        return self.total_steps

    @property
    def count(self) -> int | None:
        return None

    def begin(self, step: int) -> float | None:
        # Not in the warm-up, nor where the script has asked for a sync point, nor where training ends.
        self._whole = step - self._begun >= round(self._wanted) and not self.in_warmup(step)
        return super().begin(step)

    def observe(self, observed: Observed) -> None:
        if self._whole:
            self._wanted = self._within(self._wish(observed))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "wanted": self._wanted, "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "wanted" in state:  # a fixed schedule wants nothing
            self._wanted, self._whole = self._within(state["wanted"]), state["whole"]


class AdaptiveSchedule(VaryingSchedule):
    """Longer while the particles stay together, shorter where they drift apart; never so short that it costs too much.

    n <- max(n clip(target / drift, 1/2, 2), the n with which syncs take no more than 1 - compute_share).
    """

    def _wish(self, observed: Observed) -> float:
        wish = self._wanted
        if math.isfinite(observed.drift):  # NaN where fewer than two particles are alive
            wish *= min(max(self.options.drift / observed.drift, 0.5), 2.0) if observed.drift > 0 else 2.0
        if not observed.step_s > 0:
            return wish
        share = self.options.compute_share
        return max(wish, math.ceil(observed.held_up_s * share / ((1 - share) * observed.step_s) - 1e-9))


class WallTimeSchedule(VaryingSchedule):
    """An interval of as many steps as the slowest particle makes in so many seconds."""

    def _wish(self, observed: Observed) -> float:
        return self.options.seconds / observed.step_s if observed.step_s > 0 else self._wanted


def make_schedule(options: ScheduleConfig, interval: int, total_steps: int | None) -> Schedule:
    """``interval``: where it begins; ``total_steps``: optimizer steps of the whole training, if known."""
    kinds = {"fixed": Schedule, "adaptive": AdaptiveSchedule, "wall_time": WallTimeSchedule}
    return kinds[options.type](options, interval, total_steps)
