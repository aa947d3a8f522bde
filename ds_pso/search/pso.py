"""Particle swarm optimisation of the coefficients; Model Swarms is a choice of its options."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ds_pso.search.searcher import Candidate, PartOfSearch, Proposals, greedy, single_experts, uniform
from ds_pso.search.space import Space
from ds_pso.utils.strict_model import StrictModel


class PsoOptions(StrictModel):
    """Options of ``pso``. The defaults are the constricted swarm of Clerc and Kennedy (2002)."""

    inertia: float = Field(default=0.73, ge=0, description="Weight of the last velocity (w).")
    cognitive: float = Field(default=1.49, ge=0, description="Pull to the particle's own best position (c_p).")
    social: float = Field(default=1.49, ge=0, description="Pull to the best position of all (c_g).")
    repel: float = Field(default=0.0, ge=0, description="Push away from the worst position of all (c_w).")
    random: Literal["number", "term"] = Field(
        default="number", description="A random factor for each coefficient, or one for each term of a particle's move."
    )
    random_inertia: bool = Field(default=False, description="Whether the inertia, too, has a random factor.")
    normalize: bool = Field(default=False, description="Divide a velocity by the sum of the factors in it.")
    step: float = Field(default=1.0, gt=0, description="Part of the velocity that a position moves by (lambda).")
    step_decay: float = Field(default=1.0, gt=0, le=1, description="Factor on the step after each iteration.")
    step_min: float = Field(default=0.1, ge=0, description="The step does not decay below it.")
    particles: int = Field(
        default=0, ge=0, description="At least so many: further ones start between two experts drawn at random."
    )
    soups: bool = Field(
        default=True, description="Whether the greedy and the uniform soup, and the base, are particles, too."
    )
    first_velocity: Literal["zero", "other"] = Field(
        default="zero", description="A particle starts at rest, or towards another one drawn at random."
    )
    restart_after: int = Field(
        default=0, ge=0, description="Iterations without a new personal best after which a particle returns to it."
    )
    patience: int = Field(default=0, ge=0, description="Iterations without a new best of all that end the search.")

    @model_validator(mode="after")
    def _moves(self) -> PsoOptions:
        if not self.inertia + self.cognitive + self.social + self.repel:
            raise ValueError("inertia, cognitive, social and repel are all 0, and one must be above")
        return self


def model_swarms_options(**changes: object) -> PsoOptions:
    """Return the options of Model Swarms: constants from the middle of the ranges that were searched.

    Source: S. Feng et al., "Model Swarms", arXiv 2410.11163, algorithm 1. There a position is all weights of an expert
    and a factor is one number, so that positions stay combinations of the experts: the same swarm as here.
    """
    published: dict[str, object] = {
        **{"inertia": 0.2, "cognitive": 0.3, "social": 0.4, "repel": 0.05},
        **{"random": "term", "random_inertia": True, "normalize": True},
        **{"step": 0.75, "step_decay": 0.95, "step_min": 0.1},
        **{"particles": 20, "soups": False, "first_velocity": "other"},
        **{"restart_after": 5, "patience": 10},
    }
    return PsoOptions.model_validate(published | changes)


def velocity(
    v: NDArray[np.float64],
    x: NDArray[np.float64],
    own_best: NDArray[np.float64],
    best: NDArray[np.float64],
    worst: NDArray[np.float64],
    r: NDArray[np.float64],
    options: PsoOptions,
) -> NDArray[np.float64]:
    """v <- r_v w v + r_p c_p (own_best - x) + r_g c_g (best - x) + r_w c_w (x - worst).

    If normalized, divided by r_v w + r_p c_p + r_g c_g + r_w c_w. Source: J. Kennedy and R. Eberhart, "Particle swarm
    optimization" (1995); the last term and the division are those of Model Swarms, arXiv 2410.11163, equation 1.

    Args:
        v, x, own_best, best, worst: shape (experts, blocks).
        r: the factors r_v, r_p, r_g, r_w; shape (4, experts, blocks) or (4, 1, 1).
    """
    r_v, r_p, r_g, r_w = r if options.random_inertia else (1.0, *r[1:])
    factors = (r_v * options.inertia, r_p * options.cognitive, r_g * options.social, r_w * options.repel)
    moved = factors[0] * v + factors[1] * (own_best - x) + factors[2] * (best - x) + factors[3] * (x - worst)
    return np.asarray(moved / sum(factors) if options.normalize else moved)


def pso(space: Space, rng: np.random.Generator, options: PsoOptions) -> Proposals:
    """Particles start at the experts, soups and base, and move together: all see the bests of the iteration before."""
    starts = yield from _starts(space, rng, options)
    names = [f"particle from {candidate.by}" for _, candidate in starts]
    x = np.stack([candidate.coefficients for _, candidate in starts])
    own_cost = np.array([cost for cost, _ in starts])
    own_best, v = x.copy(), _first_velocity(x, rng, options)
    worst, worst_cost = x[own_cost.argmax()].copy(), own_cost.max()
    step = options.step
    stale = np.zeros(len(x), dtype=int)  # iterations without a new personal best
    since_best = 0
    while not options.patience or since_best < options.patience:
        best, best_cost = own_best[own_cost.argmin()].copy(), own_cost.min()
        for i in range(len(x)):
            if options.restart_after and stale[i] >= options.restart_after:
                x[i], v[i], stale[i] = own_best[i], 0.0, 0
            r = rng.random((4, *space.shape) if options.random == "number" else (4, 1, 1))
            v[i] = velocity(v[i], x[i], own_best[i], best, worst, r, options)
            x[i] += step * v[i]
        for i in range(len(x)):
            cost = yield Candidate(x[i].copy(), names[i])
            stale[i] += 1
            if cost < own_cost[i]:
                own_best[i], own_cost[i], stale[i] = x[i], cost, 0
            if cost > worst_cost:
                worst, worst_cost = x[i].copy(), cost
        since_best = 0 if own_cost.min() < best_cost else since_best + 1
        step = max(step * options.step_decay, min(step, options.step_min))


def _starts(space: Space, rng: np.random.Generator, options: PsoOptions) -> PartOfSearch[list[tuple[float, Candidate]]]:
    """Score where particles start. Return pairs (cost, candidate)."""
    ranked = yield from single_experts(space)
    found = [(cost, Candidate(space.one_hot(k), f"expert {space.experts[k]}")) for cost, k in ranked]
    if options.soups:
        cost, coefficients = yield from greedy(space)
        found.append((cost, Candidate(coefficients, "greedy soup")))
        cost = yield from uniform(space)
        found.append((cost, Candidate(space.uniform(), "uniform soup")))
        if space.has_base:
            cost = yield Candidate(space.origin(), "base")
            found.append((cost, Candidate(space.origin(), "base")))
    while len(found) < options.particles:
        a, b = rng.choice(len(space.experts), size=2, replace=False)
        part = rng.random()
        between = part * space.one_hot(a) + (1.0 - part) * space.one_hot(b)
        candidate = Candidate(between, f"{space.experts[a]} and {space.experts[b]}")
        cost = yield candidate
        found.append((cost, candidate))
    return found


def _first_velocity(x: NDArray[np.float64], rng: np.random.Generator, options: PsoOptions) -> NDArray[np.float64]:
    """Return velocities, shape (particles, experts, blocks)."""
    if options.first_velocity == "zero":
        return np.zeros_like(x)
    others = [(i + rng.integers(1, len(x))) % len(x) for i in range(len(x))]
    return np.asarray(x[others] - x)
