"""The searchers without a state of their own: single experts, soups, one scale, random weights."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ds_pso.search.searcher import Candidate, Proposals, greedy, single_experts, uniform
from ds_pso.search.space import Space
from ds_pso.utils.strict_model import StrictModel


class NoOptions(StrictModel):
    """A searcher without options."""


class TaskArithmeticOptions(StrictModel):
    """Options of ``task_arithmetic``."""

    scales: int = Field(default=20, ge=1, description="Number of scales that are tried, evenly up to `largest`.")
    largest: float = Field(default=1.0, gt=0, description="The largest scale.")


def best_single(space: Space, rng: np.random.Generator, options: NoOptions) -> Proposals:
    """Each expert as it is."""
    yield from single_experts(space)


def uniform_soup(space: Space, rng: np.random.Generator, options: NoOptions) -> Proposals:
    """The mean of all experts."""
    yield from uniform(space)


def greedy_soup(space: Space, rng: np.random.Generator, options: NoOptions) -> Proposals:
    """The mean of the experts that do not make it worse."""
    yield from greedy(space)


def task_arithmetic(space: Space, rng: np.random.Generator, options: TaskArithmeticOptions) -> Proposals:
    """base + s sum_k (expert_k - base), for several scales s.

    Source: G. Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089: one scale for all experts, the
    best of 0.05, 0.1, ..., 1.
    """
    for number in range(1, options.scales + 1):
        scale = options.largest * number / options.scales
        yield Candidate(np.full(space.shape, scale), f"scale {scale:.3g}")


def random_weights(space: Space, rng: np.random.Generator, options: NoOptions) -> Proposals:
    """Weights drawn evenly from all that are positive and sum to 1, in each block: Dirichlet(1, ..., 1)."""
    experts, blocks = space.shape
    while True:
        yield Candidate(rng.dirichlet(np.ones(experts), size=blocks).T.copy(), "random weights")
