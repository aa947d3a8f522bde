"""``python -m benchmarks.convergence TABLE``: run what is missing of a table, and draw it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.convergence.cells import TABLES, Cell, Rates, cells_of, tuned_rates, tuning_of, with_rates
from benchmarks.convergence.report import write_report
from benchmarks.convergence.results import Results, path_of
from benchmarks.convergence.run import Launch, Limits, simulate_all
from benchmarks.convergence.tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    limits = Limits(time.time() + 60 * arguments.minutes, arguments.jobs, arguments.data)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        failed = 0 if arguments.report else _run(arguments, limits)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    if is_first:
        for path in _report(arguments):
            print(path)
    return 1 if failed else 0


def _run(arguments: argparse.Namespace, limits: Limits) -> int:
    """Returns how many runs failed."""
    table, scale = arguments.table, arguments.scale
    launch = Launch()
    run = launch.run_all if arguments.real else simulate_all
    tuning, results = _tuning(scale), Results(path_of(table, real=arguments.real, scale=scale))
    failed = 0
    if arguments.tune:
        wanted = [cell for cell in cells_of(table, scale) if arguments.cells in str(cell)]
        failed += run(_missing(tuning_of(wanted), tuning), tuning, limits)
    cells = _missing(with_rates(cells_of(table, scale), _rates(tuning)), results, arguments.cells)
    known = [cell for cell in cells if cell.lr]
    if len(known) < len(cells):
        print(
            f"{len(cells) - len(known)} runs wait for their learning rates, such as {cells[0]}; first run\n"
            f"  python -m benchmarks.convergence {table} --tune{f' --scale {scale:g}' if scale != 1 else ''}",
            file=sys.stderr,
        )
    failed += run(known, results, limits)
    launch.close()
    return failed


def _missing(cells: list[Cell], results: Results, text: str = "") -> list[Cell]:
    return [cell for cell in cells if cell not in results.rows and text in str(cell)]


def _tuning(scale: float) -> Results:
    return Results(path_of("tuning", scale=scale))


def _rates(tuning: Results) -> Rates:
    def score(cell: Cell) -> float:
        outcome = tuning.rows[cell]
        return -outcome.accuracy if TASKS[cell.task].metric == "accuracy" else outcome.loss

    return tuned_rates({cell: score(cell) for cell in tuning.rows})


def _report(arguments: argparse.Namespace) -> list[Path]:
    """Draw what there is of the table."""
    results = Results(path_of(arguments.table, real=arguments.real, scale=arguments.scale))
    cells = with_rates(cells_of(arguments.table, arguments.scale), _rates(_tuning(arguments.scale)))
    rows = {cell: results.rows[cell] for cell in cells if cell in results.rows}
    real = {} if arguments.real else Results(path_of(arguments.table, real=True, scale=arguments.scale)).rows
    return write_report(arguments.table, results.path, rows, len(cells), real) if rows else []


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--tune", action="store_true", help="first find the learning rates that are not known yet")
    add("--cells", default="", metavar="TEXT", help="only runs in whose line TEXT occurs, such as 'gpt_small swarm'")
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    add("--jobs", type=int, default=1, help="worker processes of one thread each (default: 1)")
    add("--real", action="store_true", help="under a launcher: every rank a process, instead of a simulation")
    add("--scale", type=float, default=1.0, help="multiply samples and the widths of the models")
    add("--data", type=Path, help="folder with mnist/ and cifar10/ as on the hub; without it they are downloaded")
    add("--report", action="store_true", help="only draw the table from its CSV")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
