"""Times optimizer steps, without whatever else happens between two of them."""

from __future__ import annotations

import statistics


class StepTimer:
    """Times the steps since the last sync point, on one rank.

    The median counts, so that an evaluation or a checkpoint now and then is no step.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # unknown before the first step, which contains all that training begins with
        self._steps: list[float] = []

    def tick(self, now: float, spent_s: float = 0.0) -> None:
        """Count the step that has just been made.

        Args:
            now: ``time.perf_counter()``.
            spent_s: seconds since the last step that were spent on something else.
        """
        if self._since is not None:
            self._steps.append(now - self._since - spent_s)
        self._since = now

    def take(self) -> float:
        """Return the median seconds of the steps since the last call; 0 if none was timed."""
        steps, self._steps = self._steps, []
        return statistics.median(steps) if steps else 0.0
