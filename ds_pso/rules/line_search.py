"""Line search: every particle tries one length of the outer step, and all take the best."""

from __future__ import annotations

import math
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


class LineSearchConfig(RuleConfig):
    """Options of the rule ``line_search``: the subsection ``swarm.line_search``."""

    inertia: float = Field(default=0.7, gt=0, le=1, description="Inertia that a candidate of length 1 has (mu).")
    longest: float = Field(default=1.5, gt=0, description="Length of the longest candidate; the shortest has 0.")
    margin: float = Field(
        default=0.001,
        ge=0,
        lt=1,
        description="Share by which a candidate's loss must be below the mean's before it is taken.",
    )


class LineSearch(Rule):
    """Experimental. Heavy-ball inertia whose strength is searched at each sync point, in parallel.

    With a the last consensus, u = a_before - a the last step, m the mean of the living particles and
    s_i evenly spaced in [0, longest]::

        y_i = m - s_i mu u                      (s_0 = 0: the mean itself)
        b   = argmin of loss(y_i) on the probe batch, or 0 if none is better by the margin
        u  <- a - y_b;  a <- y_b;  x_i <- y_b

    Source: our own. Moves one all-reduce of the shard and P losses; keeps a, u and m. Costs a
    forward pass on the probe batch. A particle that is not alive restarts at a.
    """

    Config = LineSearchConfig
    rough_state = frozenset({"momentum"})
    options: LineSearchConfig

    @property
    def uses_probe(self) -> bool:
        return True

    @property
    def ends_equal(self) -> bool:
        return True

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        return {"anchor": copy_of, "momentum": zeros_like, "mean": zeros_like}

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        steps = max(1, sync.num_particles - 1)
        lengths = [self.options.longest * i / steps for i in range(sync.num_particles)]
        first = sync.index == 0  # there is no last step to continue
        return Plan(
            receive="mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=tuple((0.0 if first else length * self.options.inertia,) for length in lengths),
            score=not first,
            carry="settle" if first else "try",
        )

    def proceed(self, plan: Plan, scores: tuple[float, ...]) -> Plan:
        best = min(range(len(scores)), key=lambda i: (scores[i], i))
        if math.isfinite(scores[0]) and not scores[best] < scores[0] - self.options.margin * abs(scores[0]):
            best = 0
        return Plan(
            receive="nothing",
            alive=plan.alive,
            factors=(plan.factors[best],) * len(scores),
            carry="settle",
            note={"inertia": plan.factors[best][0], "scores": scores},
        )

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        anchor, momentum, mean = state["anchor"], state["momentum"], state["mean"]
        inertia = plan.factors[place.particle][0]
        if plan.receive == "mean":
            mean.copy_(received)
        x.copy_(mean).sub_(momentum, alpha=inertia)
        if plan.carry == "settle":
            momentum.copy_(anchor).sub_(x)
            anchor.copy_(x)
