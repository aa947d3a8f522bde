"""The interface of a searcher: it proposes coefficients, and learns the cost of each.

A searcher is written as a generator, which reads like its algorithm: ``cost = yield Candidate(...)``. It never sees a
model, a score or a budget, and draws all its random numbers from one generator. So what it proposes depends on the seed
and on the costs alone, and a search that was killed goes on by telling a new searcher the costs on record.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from ds_pso.search.space import Coefficients, Space

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Candidate:
    """Coefficients to score, and who proposes them, for the report."""

    coefficients: Coefficients
    by: str


# Yields candidates; is sent the cost of each: lower is better, never NaN, infinite for a model without a score.
Proposals = Generator[Candidate, float, None]
PartOfSearch = Generator[Candidate, float, Found]


class Searcher:
    """Asks and tells: ``ask`` for a candidate, ``tell`` its cost, in turn."""

    def __init__(self, proposals: Proposals) -> None:
        self._proposals = proposals
        self._next = next(proposals, None)

    def ask(self) -> Candidate | None:
        """Return the candidate whose cost is wanted next; None if there are no more."""
        return self._next

    def tell(self, cost: float) -> None:
        """Tell the cost of the candidate that was asked for: lower is better; infinite, but not NaN."""
        try:
            self._next = self._proposals.send(cost)
        except StopIteration:
            self._next = None


def single_experts(space: Space) -> PartOfSearch[list[tuple[float, int]]]:
    """Score each expert. Return pairs (cost, expert), best first."""
    costs = []
    for k, name in enumerate(space.experts):
        costs.append((yield Candidate(space.one_hot(k), f"expert {name}")))
    return sorted(zip(costs, range(len(costs)), strict=True))


def uniform(space: Space) -> PartOfSearch[float]:
    """Score the mean of all experts. Return its cost."""
    cost = yield Candidate(space.uniform(), "uniform soup")
    return cost


def greedy(space: Space) -> PartOfSearch[tuple[float, Coefficients]]:
    """Add experts to a mean, best first, each if it does not make it worse. Return (cost, coefficients).

    Source: M. Wortsman et al., "Model soups", arXiv 2203.05482, recipe 1.
    """
    ranked = yield from single_experts(space)
    best, members = ranked[0][0], [ranked[0][1]]
    for _, expert in ranked[1:]:
        cost = yield Candidate(space.soup([*members, expert]), "greedy soup")
        if cost <= best:
            best, members = cost, [*members, expert]
    return best, space.soup(members)
