"""CMA-ES over the coefficients, by the library ``cma``."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from ds_pso.errors import ConfigError
from ds_pso.search.searcher import Candidate, Proposals, greedy
from ds_pso.search.space import Space
from ds_pso.utils.strict_model import StrictModel


class CmaOptions(StrictModel):
    """Options of ``cma``."""

    sigma: float = Field(default=0.2, gt=0, description="First standard deviation of each coefficient.")
    population: int = Field(default=0, ge=0, description="Candidates in a generation; 0: 4 + 3 ln(numbers).")


def cma(space: Space, rng: np.random.Generator, options: CmaOptions) -> Proposals:
    """Start at the greedy soup.

    Source: N. Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772.
    """
    try:
        from cma import CMAEvolutionStrategy
    except ImportError as error:
        raise ConfigError('--searcher cma: needs the library cma; pip install "ds_pso[search]"') from error
    _, start = yield from greedy(space)
    settings = {
        "seed": math.nan,  # numpy's global random state is not touched
        "randn": lambda *shape: rng.standard_normal(shape),
        "verbose": -9,
        "verb_log": 0,
        **({"popsize": options.population} if options.population else {}),
    }
    strategy = CMAEvolutionStrategy(start.ravel(), options.sigma, settings)
    while not strategy.stop():
        solutions = strategy.ask()
        costs = []
        for solution in solutions:
            costs.append((yield Candidate(np.array(solution).reshape(space.shape), "CMA-ES")))
        known = [cost for cost in costs if math.isfinite(cost)] or [0.0]
        strategy.tell(solutions, [min(cost, max(known) + 1.0) for cost in costs])  # it takes ranks, but no infinity
