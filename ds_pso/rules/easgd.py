"""EASGD: particles on elastic strings around a common centre."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ds_pso.rules.base import Place, Plan, Rule, RuleConfig, RuleMemory, State, StateInit, SyncPoint, copy_of

if TYPE_CHECKING:
    from torch import Tensor


class EasgdConfig(RuleConfig):
    """Options of the rule ``easgd``: the subsection ``swarm.easgd``."""

    beta: float = Field(
        default=0.9, gt=0, le=1, description="How far the centre moves to the mean; each particle moves beta / P to it."
    )


class Easgd(Rule):
    """Synchronous elastic averaging.

    With c the centre, m the mean of the P living particles and alpha = beta / P::

        x_i <- x_i - alpha (x_i - c)
        c   <- c + beta (m - c)

    both from the values before the sync point. The centre is the model: it is what is exported.

    Source: S. Zhang, A. Choromanska, Y. LeCun, "Deep learning with Elastic Averaging SGD", NeurIPS
    2015, arXiv 1412.6651, equations 5 and 6. Moves one all-reduce of the shard; keeps c. A
    particle that is not alive restarts at the new centre.
    """

    Config = EasgdConfig
    options: EasgdConfig
    model_in = "center"

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        return {"center": copy_of}

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        alpha = self.options.beta / sum(sync.alive)
        return Plan(
            receive="mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=((alpha,),) * sync.num_particles,
        )

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        center = state["center"]
        if plan.alive[place.particle]:
            x.lerp_(center, plan.factors[place.particle][0])
        center.lerp_(received, self.options.beta)
        if not plan.alive[place.particle]:
            x.copy_(center)
