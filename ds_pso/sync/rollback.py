"""What a sync changes, put back when it fails."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_pso.shards import replace
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.update import Updater


def shared_state(updater: Updater) -> list[Tensor]:
    """Return the state of the rule and of the wire that peers have alike: flat, live, in an order equal on all."""
    tensors = [state[name] for state in updater.state for name in sorted(state)]
    return tensors + ([] if updater.differences is None else updater.differences.common)


def residuals(updater: Updater) -> list[Tensor]:
    """Return the error-feedback residuals, live."""
    return [] if updater.differences is None else updater.differences.residual


class Snapshot:
    """A rank's state before a sync.

    Args:
        live: tensors that the sync may change.
        window: of losses, which it empties.
        numbers: JSON values, likewise.
    """

    def __init__(
        self, live: Sequence[Tensor], window: FitnessWindow | None = None, numbers: Mapping[str, Any] | None = None
    ) -> None:
        self._live = list(live)
        self._kept = [tensor.detach().clone() for tensor in live]
        self._window = window
        self._losses = None if window is None else window.state()
        self.numbers = copy.deepcopy(dict(numbers or {}))

    def restore(self) -> None:
        """Put tensors and window back; the numbers are for the caller."""
        replace(self._live, self._kept)
        if self._window is not None and self._losses is not None:
            self._window.restore(*self._losses)
