"""The outcome of a search, and its entry in the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_pso.search.evaluator import Evaluator, references
from ds_pso.search.record import Record, finite, table_of
from ds_pso.search.searcher import Candidate
from ds_pso.search.space import Coefficients, Space


@dataclass(frozen=True)
class Scored:
    """A candidate of the summary.

    Attributes:
        by: who proposed it.
        score: by which was searched; NaN if it was not finite.
        test: the score of ``--test``; None without it.
    """

    by: str
    score: float
    test: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        winner, best_single, uniform_soup: their scores.
        coefficients: of the winner, by expert and block.
        evaluations: calls of the score function.
        record: path of ``search.json``; None: it was not written.
    """

    winner: Scored
    best_single: Scored
    uniform_soup: Scored
    coefficients: dict[str, dict[str, float]]
    evaluations: int
    record: Path | None

    @property
    def improved(self) -> bool:
        """False if the winner is no better than the best single expert."""
        return self.winner.score != self.best_single.score


def conclude(
    evaluator: Evaluator, record: Record, space: Space, test: Callable[[Coefficients], float] | None
) -> SearchResult:
    """Test the winner, the best expert and the uniform soup, and complete the record.

    Args:
        test: score of the model that coefficients stand for, on other samples.
    """
    assert evaluator.best is not None, "a reference has a finite score"

    def scored(candidate: Candidate) -> Scored:
        found = None if test is None else test(candidate.coefficients)
        return Scored(candidate.by, evaluator.score_of(candidate), found)

    first, blocks = references(space), list(space.blocks)
    soup, single = scored(first[-1]), scored(min(first[: len(space.experts)], key=evaluator.cost))
    winner, coefficients = scored(evaluator.best), table_of(evaluator.best.coefficients, space.experts, blocks)
    record.result = {
        "winner": _entry(winner) | {"coefficients": coefficients},
        "best_single": _entry(single),
        "uniform_soup": _entry(soup),
        "improvements": [
            {"evaluation": number, "by": candidate.by, "score": finite(score)}
            | {"coefficients": table_of(candidate.coefficients, space.experts, blocks)}
            for number, candidate, score in evaluator.improvements
        ],
    }
    record.write()
    return SearchResult(winner, single, soup, coefficients, evaluator.count, record.path)


def _entry(scored: Scored) -> dict[str, Any]:
    test = {} if scored.test is None else {"test": finite(scored.test)}
    return {"by": scored.by, "score": finite(scored.score), **test}
