"""From finished runs to tables of means and deviations over seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.convergence.cells import COMMON, OPTIMIZER_STATES, RULES, SITUATIONS, WIRES, Cell
from benchmarks.convergence.results import Outcome
from benchmarks.convergence.tasks import TASKS

Rows = Mapping[Cell, Outcome]
Measure = Callable[[Cell, Outcome], float]
_PAIRED = "mean over pairs of equal seed; bold: beyond noise"
CHANCE = 0.1  # accuracy of a guess among ten classes
_STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided quantiles of Student's t, by the number of values


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of one number over seeds."""

    mean: float  # NaN: diverged with at least one seed; inf: not reached with at least one
    deviation: float  # NaN with one seed
    spec: str  # how to format the mean
    diverged: str = ""  # "1 of 3"
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float], spec: str) -> Stat:
        several = len(values) > 1 and all(map(math.isfinite, values))
        bad = sum(map(math.isnan, values))
        deviation = statistics.stdev(values) if several else math.nan
        return cls(statistics.fmean(values), deviation, spec, f"{bad} of {len(values)}" if bad else "", len(values))

    @property
    def beyond_noise(self) -> bool:
        """Whether the mean differs from zero by Student's t-test at 95 %."""
        return self.count > 1 and abs(self.mean) > _STUDENT_95[self.count] * self.deviation / math.sqrt(self.count)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return f"{self.diverged} diverged"
        if math.isinf(self.mean):
            return "not reached"
        mean = f"{self.mean:{self.spec}}"
        return f"{mean} +- {self.deviation:{self.spec.lstrip('+')}}" if self.deviation > 0 else mean


@dataclass(frozen=True)
class Grid:
    """A table of statistics; usually a row is a rule, and a column a condition."""

    title: str
    what: str  # the quantity and its unit
    rows: list[str]
    columns: list[str]
    stats: Mapping[tuple[str, str], Stat]  # (row, column)
    paired: bool = False  # of differences; then those beyond noise are bold

    def markdown(self) -> str:
        lines = [f"**{self.what}**", "", f"| | {' | '.join(self.columns)} |"]
        lines.append("| --- |" + " --- |" * len(self.columns))
        for row in self.rows:
            lines.append(f"| {row} | {' | '.join(self._text(row, column) for column in self.columns)} |")
        return "\n".join([*lines, ""])

    def _text(self, row: str, column: str) -> str:
        stat = self.stats.get((row, column))
        if stat is None:
            return ""
        return f"**{stat}**" if self.paired and stat.beyond_noise else str(stat)


# -- measures -----------------------------------------------------------------------------------


def accuracy(_: Cell, outcome: Outcome) -> float:
    """Percent; NaN if the weights are not finite, whose guesses are sometimes right."""
    return 100 * outcome.accuracy if math.isfinite(outcome.loss) else math.nan


def loss(_: Cell, outcome: Outcome) -> float:
    return outcome.loss


def accuracy_gap(_: Cell, outcome: Outcome) -> float:
    """Percentage points."""
    return 100 * (outcome.train_accuracy - outcome.accuracy)


def loss_gap(_: Cell, outcome: Outcome) -> float:
    return outcome.loss - outcome.train_loss


def megabytes(_: Cell, outcome: Outcome) -> float:
    return outcome.megabytes


def points_per_megabyte(_: Cell, outcome: Outcome) -> float:
    return 100 * (outcome.accuracy - CHANCE) / outcome.megabytes


def rate(cell: Cell, _: Outcome) -> float:
    return cell.lr


def main_measure(task: str) -> tuple[Measure, str, str]:
    """What the tables report of a task: the measure, its name, and its format."""
    if TASKS[task].metric == "accuracy":
        return accuracy, "test accuracy, %", ".2f"
    return loss, "held-out loss, nats per token", ".3f"


# -- conditions ---------------------------------------------------------------------------------


def condition(cell: Cell, table: str) -> str:
    """The column of a cell."""
    if table in ("unequal", "fairness"):
        return cell.situation
    if table == "optimizer_state":
        return cell.optimizer_state
    return f"n = {cell.interval}" if cell.interval else "no n"


def _row(cell: Cell, table: str) -> str:
    if table == "fairness":
        return ", ".join([cell.rule, *filter(None, [cell.variant]), *([] if cell.quarantine else ["no quarantine"])])
    if table == "slow_network" and cell.rule != "allreduce":
        name = f"{cell.wire}, d = {cell.delay}"
        if cell.fragments > 1:
            name += f" streaming {cell.fragments}" if cell.streaming else f" in {cell.fragments}"
        name += f", drift {cell.drift:g}" if cell.drift else ""
        return name + (f", warm-up {cell.warmup}" if cell.warmup else "")
    return cell.rule


def _place(cell: Cell) -> tuple[float, ...]:
    """Sorts conditions."""
    situation, state = list(SITUATIONS).index(cell.situation), OPTIMIZER_STATES.index(cell.optimizer_state)
    return situation, state, cell.interval or math.inf


def _row_place(cell: Cell) -> tuple[float | str, ...]:
    """Sorts rows."""
    late = (cell.streaming, cell.delay, cell.fragments)
    parts = (cell.quarantine, bool(cell.variant), cell.variant)
    return RULES.index(cell.rule), WIRES.index(cell.wire), *late, cell.drift, cell.warmup, *parts


# -- grids --------------------------------------------------------------------------------------


def make_grid(
    title: str,
    row: Callable[[Cell], str],
    column: Callable[[Cell], str],
    rows: Rows,
    what: str,
    measure: Measure,
    spec: str,
    against: Callable[[str, str], tuple[str, str]] | None = None,
) -> Grid:
    """Statistics over the seeds for each row and column.

    Args:
        against: from a row and column to another; then the values are differences to that one with the same seed.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    for cell in sorted(rows, key=_place):
        values.setdefault((row(cell), column(cell)), {})[cell.seed] = measure(cell, rows[cell])
    stats = {}
    for place, by_seed in values.items():
        numbers = list(by_seed.values())
        if against is not None:
            base = values.get(against(*place), {}) if against(*place) != place else {}
            numbers = [value - base[seed] for seed, value in by_seed.items() if seed in base]
        if numbers:
            stats[place] = Stat.of(numbers, spec)
    names = [row(cell) for cell in sorted(rows, key=_row_place)]
    columns = list(dict.fromkeys(name for _, name in stats))
    return Grid(
        title,
        what,
        [name for name in dict.fromkeys(names) if any(name == r for r, _ in stats)],
        columns,
        stats,
        paired=against is not None,
    )


def grids_of(table: str, rows: Rows) -> Iterable[Grid]:
    """The grids of a table; the first of each title is the one for the picture."""
    by_title: dict[str, dict[Cell, Outcome]] = {}
    for cell, outcome in rows.items():
        for title in _titles(table, cell):
            by_title.setdefault(title, {})[cell] = outcome
    for title, part in by_title.items():
        task = next(iter(part)).task
        measure, what, spec = main_measure(task)
        row, column = functools.partial(_row, table=table), functools.partial(condition, table=table)
        grid = functools.partial(make_grid, title, row, column)
        yield grid(part, what, measure, spec)
        if table == "optimizer_state":
            to = f"{what}: difference to keep, {_PAIRED}"
            yield grid(part, to, measure, "+" + spec, lambda rule, _: (rule, "keep"))
        elif table == "slow_network":
            to = f"{what}: difference to fp32 at n = 32 without delay, {_PAIRED}"
            yield grid(part, to, measure, "+" + spec, lambda *_: ("fp32, d = 0", "n = 32"))
            yield grid(part, "received by each particle, MB", megabytes, ".3g")
        else:
            to = f"{what}: difference to local_sgd, {_PAIRED}"
            yield grid(part, to, measure, "+" + spec, lambda _, condition: ("local_sgd", condition))
        if table == "papers":
            exchanged = {cell: outcome for cell, outcome in part.items() if outcome.megabytes}
            yield grid(part, "test loss, nats", loss, ".4f")
            yield grid(part, "accuracy on training data - test accuracy, percentage points", accuracy_gap, "+.2f")
            yield grid(exchanged, "received by each particle, MB", megabytes, ".3g")
            yield grid(exchanged, "accuracy above chance per MB, percentage points", points_per_megabyte, ".3g")
        if table == "transformers":
            yield grid(part, "held-out loss - loss on training data, nats", loss_gap, "+.3f")
            yield grid(part, "received by each particle, MB", megabytes, ".3g")
        yield grid(part, "learning rate", rate, "g")


def _titles(table: str, cell: Cell) -> list[str]:
    """The grids that a cell belongs to."""
    if table == "fairness":
        return [f"{cell.task}, {cell.common:g} times the tuned rate of {COMMON}"]
    if table != "papers":
        return [cell.task]
    if cell.eval_every:
        return []
    particles = (4, 8) if cell.rule == "single" else (cell.particles,)
    return [f"{cell.task}, P = {P}" for P in particles]


def equal_steps_of(rows: Rows) -> Iterable[Grid]:
    """One worker against NoSync with more and more of them, all making the same number of steps."""
    for task in dict.fromkeys(cell.task for cell in rows if cell.eval_every):
        part = {cell: o for cell, o in rows.items() if cell.eval_every and cell.task == task}
        target = {cell.seed: outcome.accuracy for cell, outcome in part.items() if cell.rule == "single"}
        columns: dict[str, dict[Cell, Outcome]] = {}
        for cell in sorted(part, key=lambda cell: cell.particles):
            if cell.seed in target:
                columns.setdefault(f"P = {cell.particles}", {})[cell] = part[cell]

        def steps_needed(cell: Cell, outcome: Outcome, target: Mapping[int, float] = target) -> float:
            return steps_to(target[cell.seed], outcome.curve)

        measures: dict[str, tuple[Measure, str]] = {
            "test accuracy, %": (accuracy, ".2f"),
            "accuracy on training data - test accuracy, points": (accuracy_gap, "+.2f"),
            "steps to what one worker reaches in the end": (steps_needed, ".0f"),
        }
        stats = {
            (name, column): Stat.of([measure(*row) for row in columns[column].items()], spec)
            for name, (measure, spec) in measures.items()
            for column in columns
        }
        yield Grid(
            f"{task}, equal steps of each particle",
            "One worker (P = 1), and nosync with n = 32",
            list(measures),
            list(columns),
            stats,
        )


def steps_to(target: float, curve: str) -> float:
    """The first step of a curve with at least this accuracy; inf if there is none."""
    return next((step for step, value in parse_curve(curve) if value >= target), math.inf)


def parse_curve(curve: str) -> list[tuple[float, float]]:
    """``"64:0.5 128:0.75"`` -> [(64, 0.5), (128, 0.75)]"""
    pairs = (point.split(":") for point in curve.split())
    return [(float(step), float(value)) for step, value in pairs]
