"""Scores candidates, once each, within a budget that is counted exactly; replays what a record holds."""

from __future__ import annotations

import math
from collections.abc import Callable

from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.search.record import Evaluation, Record, digest
from ds_pso.search.searcher import Candidate, Searcher
from ds_pso.search.space import Coefficients, Space

_KNOWN_IN_A_ROW = 1000  # candidates that were all scored before: the searcher has converged


class BudgetSpent(Exception):
    """No evaluation is left."""


class Evaluator:
    """Turns scores into costs, keeps the best, and writes each evaluation into the record.

    Args:
        score: of the model that coefficients stand for; what is not finite counts as worst.
        budget: calls of ``score``, with those on record.
        higher_is_better: whether a cost is the negative score.
        on_evaluation: called after each, with it and the best score so far.
    """

    def __init__(
        self,
        record: Record,
        score: Callable[[Coefficients], float],
        budget: int,
        *,
        higher_is_better: bool = False,
        on_evaluation: Callable[[Evaluation, float], None] = lambda evaluation, best: None,
    ) -> None:
        self._record, self._score, self._budget = record, score, budget
        self._sign = -1.0 if higher_is_better else 1.0
        self._on_evaluation = on_evaluation
        self._replayed = list(record.evaluations)
        self._known: dict[str, float] = {}  # cost by digest
        self.count = 0
        self.best: Candidate | None = None
        self.best_cost = math.inf
        self.improvements: list[tuple[int, Candidate, float]] = []  # number of the evaluation, and the score

    @property
    def best_score(self) -> float:
        """The best score so far; NaN before the first that is finite."""
        return self._as_score(self.best_cost)

    def score_of(self, candidate: Candidate) -> float:
        """Return the score of a candidate that was scored before; NaN if it was not finite."""
        return self._as_score(self._known[digest(candidate.coefficients)])

    def _as_score(self, cost: float) -> float:
        return self._sign * cost if math.isfinite(cost) else math.nan

    def knows(self, candidate: Candidate) -> bool:
        """True if these coefficients were scored before."""
        return digest(candidate.coefficients) in self._known

    def cost(self, candidate: Candidate, *, again: bool = False) -> float:
        """Return the cost: lower is better, infinite if the score is not finite.

        Args:
            again: score it even if its cost is known.

        Raises:
            BudgetSpent: it would take one evaluation more than there are.
            CheckpointError: the record has another candidate at this place.
        """
        key = digest(candidate.coefficients)
        if key in self._known and not again:
            return self._known[key]
        if self.count == self._budget:
            raise BudgetSpent
        if self.count < len(self._replayed):
            evaluation = self._replayed[self.count]
            if evaluation.digest != key:
                raise CheckpointError(
                    f"{self._record.path}: evaluation {self.count + 1} was of other coefficients; the record is of "
                    "another version or machine: begin anew in another --out"
                )
        else:
            evaluation = Evaluation(candidate.by, self._score(candidate.coefficients), key)
            self._record.evaluations.append(evaluation)
            self._record.write()
        self.count += 1
        cost = self._sign * evaluation.score if math.isfinite(evaluation.score) else math.inf
        self._known[key] = cost
        if cost < self.best_cost:
            self.best, self.best_cost = candidate, cost
            self.improvements.append((self.count, candidate, evaluation.score))
        self._on_evaluation(evaluation, self.best_score)
        return cost

    def discard(self) -> None:
        """Discard the record."""
        self._record.discard()

    def run(self, searcher: Searcher) -> None:
        """Ask and tell until the budget is spent, or the searcher has no more candidates or none that is new."""
        known_in_a_row = 0
        while known_in_a_row < _KNOWN_IN_A_ROW:
            candidate = searcher.ask()
            if candidate is None:
                return
            known_in_a_row = known_in_a_row + 1 if self.knows(candidate) else 0
            try:
                searcher.tell(self.cost(candidate))
            except BudgetSpent:
                return


def references(space: Space) -> list[Candidate]:
    """Return what every search scores first, whatever the searcher: the base, each expert, and their mean."""
    experts = [Candidate(space.one_hot(k), f"expert {name}") for k, name in enumerate(space.experts)]
    base = [Candidate(space.origin(), "base")] if space.has_base else []
    return [*experts, *base, Candidate(space.uniform(), "uniform soup")]


def score_references(evaluator: Evaluator, space: Space, *, noisy: bool) -> None:
    """Score them, the first one twice.

    Raises:
        ConfigError: two scores of one model differ and ``noisy`` does not allow it, or no expert has a finite score.
    """
    first, *others = references(space)
    costs = [evaluator.cost(first)]
    before = evaluator.score_of(first)
    costs.append(evaluator.cost(first, again=True))
    if costs[0] != costs[1] and not noisy:
        evaluator.discard()
        raise ConfigError(
            f"--score: {first.by} has the score {before:.8g} and then {evaluator.score_of(first):.8g}; let it use the "
            "same samples each time and no dropout, or allow the difference with --noisy-score"
        )
    for candidate in others:
        costs.append(evaluator.cost(candidate))
    if not any(map(math.isfinite, costs)):
        evaluator.discard()
        raise ConfigError("--score: is not finite for any expert; check the score function on one of them")
