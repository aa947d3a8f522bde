"""NoLoCo: an outer step along the mean of two particles, drawn anew at each sync point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
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


class NoLoCoConfig(RuleConfig):
    """Options of the rule ``noloco``: the subsection ``swarm.noloco``."""

    outer_lr: float = Field(default=0.7, gt=0, description="Learning rate of the outer step (beta).")
    outer_momentum: float = Field(default=0.5, ge=0, lt=1, description="Momentum of the outer step (alpha).")


class NoLoCo(Rule):
    """Gossip in pairs: what a particle receives does not grow with their number.

    At each sync point the living particles are dealt into pairs, by chance and alike on all ranks. With a_i where
    particle i was after its last outer step, u_i its momentum, and j its partner::

        u_i <- alpha u_i + beta ((x_i + x_j) / 2 - a_i)
        a_i <- a_i + u_i;    x_i <- a_i

    One that is left over takes the step by itself. The model is the mean of all particles.

    Source: J. Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", arXiv
    2506.10911, the modified Nesterov momentum with gamma = beta, as in the authors' own code; it holds the particles
    together if alpha < beta < sqrt(2 + alpha^2). The random routing between pipeline stages is not here. Moves one
    shard; keeps a and u. A particle that is not alive restarts at one that is.
    """

    Config = NoLoCoConfig
    rough_state = frozenset({"momentum"})
    options: NoLoCoConfig

    @property
    def receives_alike(self) -> bool:
        return False

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        return {"anchor": copy_of, "momentum": zeros_like}

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        living = [i for i, alive in enumerate(sync.alive) if alive]
        order = np.random.default_rng([self.seed, sync.index]).permutation(living).tolist()
        sources = {i: order[i % len(order)] for i in range(sync.num_particles)}  # of those that are not alive
        sources |= {i: i for i in order}
        for i, j in zip(order[::2], order[1::2], strict=False):
            sources |= {i: j, j: i}
        return Plan(
            receive="one",
            sources=tuple(sources[i] for i in range(sync.num_particles)),
            alive=sync.alive,
        )

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        anchor, momentum = state["anchor"], state["momentum"]
        if not plan.alive[place.particle]:
            x.copy_(received)
            anchor.copy_(received)
            momentum.zero_()
            return
        step = (x + received).div_(2).sub_(anchor)
        momentum.mul_(self.options.outer_momentum).add_(step, alpha=self.options.outer_lr)
        anchor.add_(momentum)
        x.copy_(anchor)
