"""All that a sync point changes: kept to be put back if it fails, and sent to a particle that has missed some."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_pso.sampler import SwarmSampler
from ds_pso.shards import replace
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.update import Updater

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
            # A schedule may go on from the rate itself, and sets the next one only at its next step.
            "lrs": [float(group["lr"]) for group in self.engine.basic_optimizer.param_groups],
            "samplers": [sampler.state_dict() for sampler in self.samplers],
        }

    def write(self, values: Mapping[str, Any]) -> None:
        """Go on from there. Samplers that are made later begin there, too: see ``place``."""
        for name, value in values["engine"].items():
            setattr(self.engine, name, value)
        if self.engine.lr_scheduler is not None and values["lr_scheduler"] is not None:
            mine = self.engine.lr_scheduler.state_dict()
            self.engine.lr_scheduler.load_state_dict(_filled_in(mine, values["lr_scheduler"]))
        for group, lr in zip(self.engine.basic_optimizer.param_groups, values["lrs"], strict=True):
            group["lr"] = lr
        self._waiting = list(values["samplers"])
        for sampler in self.samplers:
            self.place(sampler)

    def place(self, sampler: SwarmSampler) -> None:
        """Let a sampler go on where that of the giver is."""
        if self._waiting:
            sampler.load_state_dict(self._waiting.pop(0))


def at_another_step(schedule: Mapping[str, Any], theirs: int, mine: int) -> dict[str, Any]:
    """State of a sync schedule at step ``theirs``, for who has made other steps: as many since the last sync point."""
    return {**schedule, "begun": schedule["begun"] + mine - theirs}


def _plain(value: Any) -> Any:
    """What JSON can hold of a learning-rate schedule's state; the rest is empty."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool)) else None


def _filled_in(mine: Any, told: Any) -> Any:
    """What was told, and where that says nothing, what each particle has from its own script: functions and such."""
    if isinstance(mine, Mapping):
        return {key: _filled_in(item, told.get(key)) for key, item in mine.items()} if told is not None else mine
    if isinstance(mine, (list, tuple)) and isinstance(told, list) and len(mine) == len(told):
        return type(mine)(map(_filled_in, mine, told))
    return mine if told is None else told
