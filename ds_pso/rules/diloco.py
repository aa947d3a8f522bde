"""DiLoCo: the mean movement of the particles is a gradient for an outer Nesterov step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

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

AUTO: Literal["auto"] = "auto"
_FEW_SYNCS = 64  # in so short a training a high outer momentum has no time to pay
_IF_FEW = (0.7, 0.6)
# (outer learning rate, momentum) by the number of particles; between two rows in proportion to log P.
_PUBLISHED = {
    "AdamW": {1: (0.4, 0.9), 2: (0.6, 0.9), 4: (0.6, 0.9), 8: (0.8, 0.9)},
    "Muon": {1: (0.7, 0.6), 2: (0.9, 0.8), 16: (1.0, 0.9)},
}


class DiLoCoConfig(RuleConfig):
    """Options of the rule ``diloco``: the subsection ``swarm.diloco``."""

    outer_lr: float | Literal["auto"] = Field(
        default=AUTO, description='Outer learning rate (eta), above 0; "auto": what was published for P.'
    )
    outer_momentum: float | Literal["auto"] = Field(
        default=AUTO, description='Outer Nesterov momentum (mu), at least 0 and below 1; "auto": likewise.'
    )
    merge: Literal["mean", "rda"] = Field(
        default="mean",
        description='How movements are merged: "mean", or "rda": of each matrix the mean direction, times their mean '
        "length.",
    )

    @field_validator("outer_lr", mode="before")
    @classmethod
    def _outer_lr(cls, value: object) -> object:
        if value == AUTO or 0 < _number(value) < math.inf:
            return value
        raise ValueError('must be a number above 0, or "auto"')

    @field_validator("outer_momentum", mode="before")
    @classmethod
    def _outer_momentum(cls, value: object) -> object:
        if value == AUTO or 0 <= _number(value) < 1:
            return value
        raise ValueError('must be a number of at least 0 and below 1, or "auto"')


class DiLoCo(Rule):
    """Outer SGD with Nesterov momentum on the pseudo-gradient.

    With a the last common state (the anchor) and x_j the particles::

        g <- a - mean_j x_j
        u <- mu u + g
        a <- a - eta (g + mu u)
        x_i <- a

    "auto" is what was found best for P and the inner optimizer, at about 30 steps between two syncs: with AdamW
    Z. Charles et al., "Communication-Efficient Language Model Training Scales Reliably and Robustly: Scaling Laws for
    DiLoCo", arXiv 2503.09799; with Muon B. Thérien et al., "MuLoCo", arXiv 2505.23725. In a training that is known to
    have 64 syncs or fewer it is 0.7 and 0.6, which was better in our own tables.

    With one particle x_1 stands for the mean: the outer step needs no peer, and is that of SNOO, D. Kallusky et al.,
    arXiv 2510.15830, and of DiLoCo with M = 1 in 2503.09799.

    With ``merge`` "rda" the mean of each matrix's movements is as long as these are: see
    ``ds_pso.sync.direction_mean``. With eta = 1 and mu = 0 that is local SGD with this merge.

    Source: A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
    Models", arXiv 2311.08105, Algorithm 1. Moves one all-reduce of the shard; keeps a and u.
    """

    Config = DiLoCoConfig
    options: DiLoCoConfig
    rough_state = frozenset({"momentum"})
    _inner = "AdamW"

    def inside(self, optimizer: str) -> DiLoCo:
        found = copy.copy(self)
        found._inner = "Muon" if optimizer.startswith("Muon") else "AdamW"
        return found

    @property
    def ends_equal(self) -> bool:
        return True

    @property
    def acts_alone(self) -> bool:
        return (self.options.outer_lr, self.options.outer_momentum) != (1, 0)  # with which a becomes x_1

    @property
    def receives_the_mean(self) -> bool:
        return True

    @property
    def keeps_lengths_from(self) -> str | None:
        return "anchor" if self.options.merge == "rda" else None

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        if self.options.outer_momentum != 0:
            return {"anchor": copy_of, "momentum": zeros_like}
        return {"anchor": copy_of}

    def outer_step(self, particles: int, syncs: int | None) -> tuple[float, float]:
        """Return eta and mu.

        Args:
            particles: P.
            syncs: of the whole training; None: unknown, and taken for many.
        """
        eta, mu = _IF_FEW if syncs is not None and syncs <= _FEW_SYNCS else published(self._inner, particles)
        options = self.options
        return (
            eta if isinstance(options.outer_lr, str) else options.outer_lr,
            mu if isinstance(options.outer_momentum, str) else options.outer_momentum,
        )

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        eta, mu = self.outer_step(sync.num_particles, sync.total)
        return Plan(
            receive="mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=((eta, mu),) * sync.num_particles,
            note={"outer_lr": eta, "outer_momentum": mu},
        )

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        eta, mu = plan.factors[place.particle]
        anchor = state["anchor"]
        gradient = anchor - received
        if mu > 0:
            momentum = state["momentum"]
            momentum.mul_(mu).add_(gradient)
            gradient.add_(momentum, alpha=mu)
        anchor.sub_(gradient, alpha=eta)
        x.copy_(anchor)


def published(inner: str, particles: int) -> tuple[float, float]:
    """Return the outer learning rate and momentum that were published for P particles, beyond the table its end."""
    table = _PUBLISHED[inner]
    below = max(p for p in table if p <= particles)
    above = min((p for p in table if p >= particles), default=below)
    part = math.log(particles / below) / math.log(above / below) if above > below else 0.0
    eta, mu = (a + part * (b - a) for a, b in zip(table[below], table[above], strict=True))
    return round(eta, 3), round(mu, 3)


def _number(value: object) -> float:
    """Return a JSON number; NaN, which is in no range, for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
