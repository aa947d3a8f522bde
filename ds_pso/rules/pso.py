"""PSO-PS: particle swarm optimisation of the weights, with the training loss as fitness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ds_pso.rules.base import Plan, Rule, RuleConfig, State, SyncPoint, best_of


class PsoConfig(RuleConfig):
    """``swarm.pso``"""

    inertia: float = Field(default=0.0, ge=0, lt=1, description="Weight of the last velocity (w).")
    cognitive: float = Field(default=0.0, ge=0, description="Pull towards the particle's own best (c1).")
    social: float = Field(default=1.0, ge=0, description="Pull towards the best particle (c2).")
    best: Literal["window", "all_time"] = Field(
        default="window",
        description="Best particle: lowest loss since the last sync, or the best position ever seen.",
    )
    randomness: Literal["none", "per_sync"] = Field(
        default="none",
        description="r1 and r2: one half each, or drawn from U(0, 1) per particle and sync point.",
    )


class Pso(Rule):
    """Velocity towards a particle's own best position and the swarm's best position.

    At each sync point, with f_i the loss of particle i since the last one::

        p_i <- x_i  if f_i is the lowest that particle i has seen    (personal best)
        g   <- x_b  with b = argmin f          (best = "window")
               p_b  with b = argmin_j min f_j  (best = "all_time")
        v_i <- w v_i + c1 r1 (p_i - x_i) + c2 r2 (g - x_i)
        x_i <- x_i + v_i

    Source: Q. Ye et al., "PSO-PS: Parameter Synchronization with Particle Swarm Optimization for
    Distributed Training of Deep Neural Networks", arXiv 2009.03816; J. Kennedy and R. Eberhart,
    1995. Moves one broadcast of a shard; keeps v when w > 0 and p when c1 > 0 or best is
    "all_time". r1 and r2 are numbers, never tensors, so that the result does not depend on how
    the model is sharded. A particle that is not alive restarts at g with velocity zero.
    """

    Config = PsoConfig
    uses_fitness = True

    @property
    def _keeps_best(self) -> bool:
        return self.options.cognitive > 0 or self.options.best == "all_time"

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        state = {}
        if self.options.inertia > 0:
            state["velocity"] = torch.zeros_like(x)
        if self._keeps_best:
            state["best_position"] = x.detach().clone()
        return state

    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        losses = sync.losses()
        seen = memory.get("best_fitness") or [math.inf] * sync.num_particles
        # A dead particle restarts elsewhere: what it once found no longer is its own.
        seen = [loss if alive else math.inf for loss, alive in zip(seen, sync.alive, strict=True)]
        best_fitness = [min(old, new) for old, new in zip(seen, losses, strict=True)]
        all_time = self.options.best == "all_time"
        factors = []
        for particle in range(sync.num_particles):
            r1, r2 = self._draw(sync.index, particle)
            improved = float(losses[particle] < seen[particle])
            factors.append((improved, self.options.cognitive * r1, self.options.social * r2))
        return Plan(
            receive="one",
            source=best_of(best_fitness if all_time else losses, sync.alive),
            send="best_position" if all_time else "x",
            alive=sync.alive,
            factors=tuple(factors),
            memory={"best_fitness": best_fitness},
        )

    def _draw(self, index: int, particle: int) -> tuple[float, float]:
        if self.options.randomness == "none":
            return 0.5, 0.5
        r1, r2 = np.random.default_rng([self.seed, index, particle]).random(2)
        return float(r1), float(r2)

    def before_exchange(self, x: Tensor, state: State, plan: Plan, particle: int) -> None:
        if self._keeps_best and plan.factors[particle][0]:
            state["best_position"].copy_(x)

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, particle: int) -> None:
        if not plan.alive[particle]:
            x.copy_(received)
            if "velocity" in state:
                state["velocity"].zero_()
            if "best_position" in state:
                state["best_position"].copy_(received)
            return
        _, cognitive, social = plan.factors[particle]
        velocity = (received - x).mul_(social)
        if cognitive > 0:
            velocity.add_(state["best_position"] - x, alpha=cognitive)
        if "velocity" in state:
            velocity.add_(state["velocity"], alpha=self.options.inertia)
            state["velocity"].copy_(velocity)
        x.add_(velocity)
