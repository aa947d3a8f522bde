"""DiLoCo: the mean movement of the particles is a gradient for an outer Nesterov step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ds_pso.rules.base import (
    Place,
    Plan,
    Rule,
    RuleConfig,
    RuleMemory,
    State,
    StateInit,
    SyncPoint,
    copy_of,
    zeros_like,
)

if TYPE_CHECKING:
    from torch import Tensor


class DiLoCoConfig(RuleConfig):
    """Options of the rule ``diloco``: the subsection ``swarm.diloco``."""

    outer_lr: float = Field(default=0.7, gt=0, description="Outer learning rate (eta).")
    outer_momentum: float = Field(default=0.6, ge=0, lt=1, description="Outer Nesterov momentum (mu).")


class DiLoCo(Rule):
    """Outer SGD with Nesterov momentum on the pseudo-gradient.

    With a the last common state (the anchor) and x_j the particles::

        g <- a - mean_j x_j
        u <- mu u + g
        a <- a - eta (g + mu u)
        x_i <- a

    Source: A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
    Models", arXiv 2311.08105, Algorithm 1. Moves one all-reduce of the shard; keeps a and u.
    """

    Config = DiLoCoConfig
    options: DiLoCoConfig
    rough_state = frozenset({"momentum"})

    @property
    def ends_equal(self) -> bool:
        return True

    @property
    def receives_the_mean(self) -> bool:
        return True

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        if self.options.outer_momentum > 0:
            return {"anchor": copy_of, "momentum": zeros_like}
        return {"anchor": copy_of}

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        return Plan(receive="mean", weights=sync.mean_weights(), alive=sync.alive)

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        eta, mu = self.options.outer_lr, self.options.outer_momentum
        anchor = state["anchor"]
        gradient = anchor - received
        if mu > 0:
            momentum = state["momentum"]
            momentum.mul_(mu).add_(gradient)
            gradient.add_(momentum, alpha=mu)
        anchor.sub_(gradient, alpha=eta)
        x.copy_(anchor)
