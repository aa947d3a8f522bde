"""``python -m benchmarks.minutes``: held-out loss over minutes, each stack for the same time over a slow link."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from benchmarks.minutes.report import write_report
from benchmarks.minutes.results import FOLDER, Results, Run
from benchmarks.minutes.run import Plan, carry_out, missing
from benchmarks.minutes.settings import MODEL, ROWS, Row
from benchmarks.minutes.text import prepare_text
from benchmarks.slow_link.network import why_not


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    results = Results(arguments.folder)
    plan = Plan(arguments.minutes, arguments.search_minutes, arguments.seeds, arguments.model)
    failed: set[Run] = set()
    if not arguments.report:
        reason = why_not()
        if reason:
            print(f"minutes: skipped: {reason}", file=sys.stderr)
            return 0
        try:
            _run_all(_wanted(arguments.only), results, plan, time.time() + 3600 * arguments.hours, failed)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    for path in write_report(results, plan):
        print(path)
    return 1 if failed else 0


def _wanted(only: list[str]) -> list[Row]:
    rows = [row for row in ROWS if any(text in row.name for text in only or [""])]
    if importlib.util.find_spec("torchft") is None:
        print("minutes: without torchft; to compare with it: pip install torchft==0.2.0", file=sys.stderr)
        rows = [row for row in rows if row.stack.stack != "torchft"]
    return rows


def _run_all(wanted: list[Row], results: Results, plan: Plan, deadline: float, failed: set[Run]) -> None:
    """One run after the other, for each needs both cores, until nothing is missing or time is up."""
    prepare_text()
    while time.time() < deadline:
        run = next((run for run in missing(wanted, results.rows, plan) if run not in failed), None)
        if run is None:
            return
        try:
            outcome = carry_out(run)
        except RuntimeError as error:
            failed.add(run)
            print(f"{run}: failed: {error}", file=sys.stderr, flush=True)
            continue
        results.add(run, outcome)
        print(f"{run}: {outcome.loss:.4f}, {outcome.tokens_per_s:.0f} tokens/s", flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minutes", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--minutes", type=float, default=15.0, help="of each training (default: 15)")
    add(
        "--search_minutes", type=float, default=2.0, help="of each training that looks for a learning rate (default: 2)"
    )
    add("--seeds", type=int, default=1, help="of each row (default: 1)")
    add("--model", default=MODEL, help=f"llama:<layers>x<width> (default: {MODEL})")
    add("--only", nargs="*", metavar="TEXT", help="rows in whose name one of these occurs, such as 'ds_pso Muon'")
    add("--hours", type=float, default=float("inf"), help="start no run after this time")
    add("--folder", type=Path, default=FOLDER, help="of the results")
    add("--report", action="store_true", help="only draw what there is of these minutes and this model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
