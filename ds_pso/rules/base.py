"""What a sync rule is: a plan made from fitness alone, and an elementwise update of a shard.

A rule never communicates. It says what it needs from its peers (``Plan.receive``) and the
exchange moves just that. All methods are pure: what must survive from one sync point to the
next lies in ``state`` (one tensor per shard) and in ``memory`` (JSON values, equal on all ranks),
so the same rule runs under ZeRO, in a simulation of many particles, and in a unit test.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

State = MutableMapping[str, Tensor]  # name -> tensor of the shape, dtype and device of the shard


class StrictModel(BaseModel):
    """A config section in which a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RuleConfig(StrictModel):
    """Options of a rule: the subsection of ``swarm`` that has the rule's name."""


@dataclass(frozen=True)
class SyncPoint:
    """What every rank of every particle knows alike when the particles meet."""

    index: int  # how many sync points came before
    fitness: tuple[float, ...]  # loss of each particle, shape (P,); lower is better
    alive: tuple[bool, ...]  # shape (P,); false: loss or weights are not finite

    @property
    def num_particles(self) -> int:
        return len(self.fitness)

    def mean_weights(self) -> tuple[float, ...]:
        """Equal weights of the living particles, shape (P,); they sum to one."""
        share = 1.0 / sum(self.alive)
        return tuple(share if alive else 0.0 for alive in self.alive)

    def losses(self) -> list[float]:
        """Fitness with NaN, and whatever a dead particle reports, as the worst."""
        return [
            loss if alive and not math.isnan(loss) else math.inf
            for loss, alive in zip(self.fitness, self.alive, strict=True)
        ]

    def best_weights(self) -> tuple[float, ...]:
        """One for the living particle with the lowest loss, zero for the others, shape (P,)."""
        best = best_of(self.losses(), self.alive)
        return tuple(float(i == best) for i in range(self.num_particles))


def best_of(losses: Sequence[float], alive: Sequence[bool]) -> int:
    """Index of the living particle with the lowest loss; the lower index wins a tie."""
    # The dead come last even when nobody has a loss and all are equally bad.
    return min(range(len(losses)), key=lambda i: (not alive[i], losses[i], i))


@dataclass(frozen=True)
class Plan:
    """What to move at this sync point, and the numbers the update needs. Equal on all ranks."""

    receive: Literal["mean", "one"]  # weighted mean over the particles, or one particle's tensor
    weights: tuple[float, ...] = ()  # for "mean": shape (P,), sum one
    source: int = 0  # for "one": the particle that sends
    send: str = "x"  # the shard itself, or the name of a state tensor
    alive: tuple[bool, ...] = ()  # shape (P,)
    factors: tuple[tuple[float, ...], ...] = ()  # shape (P, k): numbers of each particle's update
    memory: Mapping[str, Any] = field(default_factory=dict)  # for the next sync point


class Rule(ABC):
    """One algorithm. Subclasses are registered in ``ds_pso.rules`` under their JSON name."""

    Config: ClassVar[type[RuleConfig]] = RuleConfig
    uses_fitness: ClassVar[bool] = False

    def __init__(self, options: Any, seed: int = 0) -> None:
        self.options = options
        self.seed = seed

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """State for a shard ``x`` on which all particles agree; empty when the rule keeps none."""
        return {}

    @abstractmethod
    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        """Decide what to move. Called on every rank with equal arguments; at least one particle lives."""

    def before_exchange(self, x: Tensor, state: State, plan: Plan, particle: int) -> None:  # noqa: B027
        """Bring ``state`` up to date before anything is sent. Elementwise, in place."""

    @abstractmethod
    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, particle: int) -> None:
        """Move ``x`` (any shape, fp32) with what came from the peers. Elementwise, in place.

        A particle that is not alive must come out with finite ``x`` and ``state``.
        """
