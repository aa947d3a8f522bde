"""All that a sync point changes: kept to be put back if it fails, and sent to a particle that has missed some."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_pso.fitness import FitnessWindow
from ds_pso.sampler import SwarmSampler
from ds_pso.shards import replace
from ds_pso.updater import Updater

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def common_tensors(updater: Updater) -> list[Tensor]:
    """State of the rule, and what the wire knows to be common; flat, live, in an order that is equal on all peers."""
    tensors = [state[name] for state in updater.state for name in sorted(state)]
    return tensors + owed(updater, common=True)


def owed(updater: Updater, *, common: bool = False) -> list[Tensor]:
    """What rounding still owes the others; or the ``common`` state that all know alike."""
    if updater.differences is None:
        return []
    return updater.differences.common if common else updater.differences.residual


class Undo:
    """What a rank had before a sync point.

    Args:
        live: tensors that the sync point may change.
        window: of losses, which it empties.
        numbers: JSON values, likewise.
    """

    def __init__(self, live: Sequence[Tensor], window: FitnessWindow, numbers: Mapping[str, Any]) -> None:
        self._live = list(live)
        self._kept = [tensor.detach().clone() for tensor in live]
        self._window = window
        self._total, self._count, self._steps = window.total, window.count, window.steps
        self.numbers = copy.deepcopy(dict(numbers))

    def put_back(self) -> None:
        replace(self._live, self._kept)
        self._window.restore(self._total, self._count, self._steps)


@dataclass
class Progress:
    """How far training has come: what the engine and the samplers count."""

    engine: Any
    samplers: list[SwarmSampler]
    _waiting: list[dict[str, int]] = field(default_factory=list)  # state of samplers that are not made yet

    def read(self) -> dict[str, Any]:
        """JSON values."""
        scheduler = self.engine.lr_scheduler
        return {
            "engine": {name: getattr(self.engine, name) for name in _COUNTERS},
            "lr_scheduler": None if scheduler is None else _plain(scheduler.state_dict()),
            "samplers": [sampler.state_dict() for sampler in self.samplers],
        }

    def write(self, values: Mapping[str, Any]) -> None:
        """Go on from there. Samplers that are made later begin there, too: see ``place``."""
        for name, value in values["engine"].items():
            setattr(self.engine, name, value)
        if self.engine.lr_scheduler is not None and values["lr_scheduler"] is not None:
            self.engine.lr_scheduler.load_state_dict(values["lr_scheduler"])
        self._waiting = list(values["samplers"])
        for sampler in self.samplers:
            self.place(sampler)

    def place(self, sampler: SwarmSampler) -> None:
        """Let a sampler go on where that of the giver is."""
        if self._waiting:
            sampler.load_state_dict(self._waiting.pop(0))


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a learning-rate schedule; what else it holds, each particle has from its own config."""
    kinds = (int, float, str, bool, type(None))
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, kinds) or (isinstance(value, list) and all(isinstance(item, kinds) for item in value))
    }
