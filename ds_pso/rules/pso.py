"""PSO-PS: particle swarm optimisation of the weights, with the training loss as fitness."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from ds_pso.rules.base import (
    Place,
    Plan,
    Rule,
    RuleConfig,
    RuleMemory,
    State,
    StateInit,
    SyncPoint,
    best_of,
    copy_of,
    zeros_like,
)

if TYPE_CHECKING:
    from torch import Tensor


class PsoConfig(RuleConfig):
    """Options of the rule ``pso``: the subsection ``swarm.pso``."""

    inertia: float = Field(default=0.0, ge=0, lt=1, description="Weight of the last velocity (w).")
    cognitive: float = Field(default=0.0, ge=0, description="Pull towards the particle's own best (c1).")
    social: float = Field(default=1.0, ge=0, description="Pull towards the best particle (c2).")
    final_inertia: float | None = Field(
        default=None, ge=0, lt=1, description="If given, w moves to it linearly over training."
    )
    final_cognitive: float | None = Field(
        default=None, ge=0, description="If given, c1 moves to it linearly over training."
    )
    final_social: float | None = Field(
        default=None, ge=0, description="If given, c2 moves to it linearly over training."
    )
    constriction: bool = Field(
        default=False,
        description="Clerc's constriction: scales the velocity by chi(c1 + c2) and sets w to 1; c1 + c2 > 4.",
    )
    velocity_clamp: float | None = Field(
        default=None, gt=0, description="Largest change of any weight at a sync point; none unless given."
    )
    best: Literal["window", "all_time"] = Field(
        default="window",
        description="Best particle: lowest loss since the last sync, or the best position ever seen.",
    )
    topology: Literal["global", "ring"] = Field(
        default="global",
        description="Whom the best is sought among: all particles, or oneself and the two neighbours in a ring.",
    )
    randomness: Literal["none", "per_sync", "per_tensor"] = Field(
        default="none",
        description="r1 and r2: one half each, or drawn from U(0, 1) per particle and sync point, "
        "or also per parameter tensor.",
    )

    @model_validator(mode="after")
    def _constriction_fits(self) -> PsoConfig:
        if self.constriction:
            if self.inertia or self.final_inertia:
                raise ValueError("constriction sets the inertia; remove inertia and final_inertia, or constriction")
            for when, c1, c2 in (
                ("", self.cognitive, self.social),
                ("final_", *_finals(self)),
            ):
                if c1 + c2 <= 4:
                    raise ValueError(
                        f"constriction needs {when}cognitive + {when}social > 4 and they are {c1 + c2:g}; "
                        "Clerc and Kennedy take 2.05 each"
                    )
        return self


def _finals(options: PsoConfig) -> tuple[float, float]:
    c1, c2 = options.final_cognitive, options.final_social
    return options.cognitive if c1 is None else c1, options.social if c2 is None else c2


class Pso(Rule):
    """Velocity towards a particle's own best position and the best position it knows of.

    At each sync point, with f_i the loss of particle i since the last one and N_i the particles
    that i knows of (all, or i - 1, i and i + 1 in a ring)::

        p_i <- x_i  if f_i is the lowest that particle i has seen            (personal best)
        g_i <- x_b  with b = argmin over N_i of f_j          (best = "window")
               p_b  with b = argmin over N_i of min f_j      (best = "all_time")
        v_i <- clamp(chi (w v_i + c1 r1 (p_i - x_i) + c2 r2 (g_i - x_i)))
        x_i <- x_i + v_i

    chi = 1, or with constriction 2 / (phi - 2 + sqrt(phi^2 - 4 phi)), phi = c1 + c2, and w = 1.

    Source: Q. Ye et al., "PSO-PS: Parameter Synchronization with Particle Swarm Optimization for
    Distributed Training of Deep Neural Networks", arXiv 2009.03816; J. Kennedy and R. Eberhart,
    "Particle Swarm Optimization", 1995; M. Clerc and J. Kennedy, "The Particle Swarm: Explosion,
    Stability, and Convergence", 2002, equation 4 (constriction). Moves one broadcast of a shard, or
    in a ring one shard to each; keeps v when w > 0 and p when c1 > 0 or best is "all_time". r1 and
    r2 are numbers, never tensors, so that the result does not depend on how the model is sharded. A
    particle that is not alive restarts at g with velocity zero.
    """

    Config = PsoConfig
    rough_state = frozenset({"velocity"})
    memory_of_particles = frozenset({"best_fitness"})
    options: PsoConfig

    @property
    def uses_fitness(self) -> bool:
        return True

    @property
    def uses_progress(self) -> bool:
        o = self.options
        return not o.final_inertia is o.final_cognitive is o.final_social is None

    @property
    def receives_alike(self) -> bool:
        return self.options.topology == "global"

    @property
    def per_parameter(self) -> bool:
        return self.options.randomness == "per_tensor"

    @property
    def _keeps_velocity(self) -> bool:
        o = self.options
        return o.constriction or o.inertia > 0 or bool(o.final_inertia)

    @property
    def _keeps_best(self) -> bool:
        o = self.options
        return o.cognitive > 0 or bool(o.final_cognitive) or o.best == "all_time"

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        state: dict[str, StateInit] = {}
        if self._keeps_velocity:
            state["velocity"] = zeros_like
        if self._keeps_best:
            state["best_position"] = copy_of
        return state

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        losses = sync.losses()
        seen = memory.get("best_fitness") or [math.inf] * sync.num_particles
        # A dead particle restarts elsewhere: what it once found no longer is its own.
        seen = [loss if alive else math.inf for loss, alive in zip(seen, sync.alive, strict=True)]
        best_fitness = [min(old, new) for old, new in zip(seen, losses, strict=True)]
        all_time = self.options.best == "all_time"
        sources = self._sources(best_fitness if all_time else losses, sync.alive)
        inertia, cognitive, social = self._coefficients(sync)
        factors = []
        for particle in range(sync.num_particles):
            improved = float(losses[particle] < seen[particle])
            r1, r2 = (1.0, 1.0) if self.per_parameter else self._draw(sync.index, particle)
            factors.append((improved, inertia, cognitive * r1, social * r2))
        return Plan(
            receive="one",
            sources=sources,
            send="best_position" if all_time else "x",
            alive=sync.alive,
            factors=tuple(factors),
            carry=sync.index,
            note={"best": best_of(best_fitness if all_time else losses, sync.alive)},
            memory={"best_fitness": best_fitness},
        )

    def _sources(self, losses: list[float], alive: tuple[bool, ...]) -> tuple[int, ...]:
        """Return the best that each particle knows of; the best of all for one that has no living neighbour."""
        everybody = range(len(losses))
        best = best_of(losses, alive)
        if self.options.topology == "global":
            return tuple(best for _ in everybody)
        sources = []
        for i in everybody:
            known = sorted({(i - 1) % len(losses), i, (i + 1) % len(losses)})
            chosen = known[best_of([losses[j] for j in known], [alive[j] for j in known])]
            sources.append(chosen if alive[chosen] else best)
        return tuple(sources)

    def _coefficients(self, sync: SyncPoint) -> tuple[float, float, float]:
        """Return w, c1 and c2 at this sync point, each times chi."""
        o = self.options
        pairs = ((o.inertia, o.final_inertia), (o.cognitive, o.final_cognitive), (o.social, o.final_social))
        w, c1, c2 = (start if final is None else start + (final - start) * sync.progress for start, final in pairs)
        if not o.constriction:
            return w, c1, c2
        phi = c1 + c2
        chi = 2 / (phi - 2 + math.sqrt(phi * phi - 4 * phi))
        return chi, chi * c1, chi * c2

    def _draw(self, index: int, particle: int, parameter: str | None = None) -> tuple[float, float]:
        """Return r1 and r2, drawn from numbers that are the same on all ranks."""
        if self.options.randomness == "none":
            return 0.5, 0.5
        key = [self.seed, index, particle] + ([] if parameter is None else [zlib.crc32(parameter.encode())])
        r1, r2 = np.random.default_rng(key).random(2)
        return float(r1), float(r2)

    def before_exchange(self, x: Tensor, state: State, plan: Plan, place: Place) -> None:
        if self._keeps_best and plan.factors[place.particle][0]:
            state["best_position"].copy_(x)

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        if not plan.alive[place.particle]:
            x.copy_(received)
            if "velocity" in state:
                state["velocity"].zero_()
            if "best_position" in state:
                state["best_position"].copy_(received)
            return
        _, inertia, cognitive, social = plan.factors[place.particle]
        if self.per_parameter:
            assert isinstance(plan.carry, int)
            r1, r2 = self._draw(plan.carry, place.particle, place.parameter)
            cognitive, social = cognitive * r1, social * r2
        velocity = (received - x).mul_(social)
        if cognitive > 0:
            velocity.add_(state["best_position"] - x, alpha=cognitive)
        if "velocity" in state:
            velocity.add_(state["velocity"], alpha=inertia)
        if self.options.velocity_clamp is not None:
            velocity.clamp_(-self.options.velocity_clamp, self.options.velocity_clamp)
        if "velocity" in state:
            state["velocity"].copy_(velocity)
        x.add_(velocity)
