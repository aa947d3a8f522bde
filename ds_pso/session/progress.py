"""How far training has come: what the engine, its schedule and the samplers count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_pso.sampler import SwarmSampler

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass
class TrainingProgress:
    """Reads and writes the counters of one rank's training."""

    engine: Any
    samplers: list[SwarmSampler]
    _waiting: list[dict[str, int]] = field(default_factory=list)  # state of samplers that are not made yet

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return int(self.engine.global_steps)

    def read(self) -> dict[str, Any]:
        """Return it as JSON values."""
        scheduler = self.engine.lr_scheduler
        return {
            "step": self.step,
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
        """Let a new sampler go on where that of the donor is, if this particle has recovered."""
        if self._waiting:
            sampler.load_state_dict(self._waiting.pop(0))


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a learning-rate schedule's state; the rest is empty."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool)) else None


def _filled_in(mine: Any, received: Any) -> Any:
    """Return what was received, and where that is empty, what each particle has from its own script."""
    if isinstance(mine, Mapping):
        if received is None:
            return mine
        return {key: _filled_in(item, received.get(key)) for key, item in mine.items()}
    if isinstance(mine, (list, tuple)) and isinstance(received, list) and len(mine) == len(received):
        return type(mine)(map(_filled_in, mine, received))
    return mine if received is None else received
