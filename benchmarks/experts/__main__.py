"""``python -m benchmarks.experts SIZE``: train experts, and search with every searcher for every target."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.experts.results import FOLDER, Results
from benchmarks.experts.settings import SIZES


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    results = Results(arguments.size, arguments.results)
    if not arguments.report:
        from benchmarks.experts.domains import load_domains
        from benchmarks.experts.run import run_all

        place = arguments.cache / f"{arguments.size}{'-text' if arguments.text else ''}"
        deadline = time.time() + 60 * arguments.minutes
        try:
            only = arguments.only or [""]
            run_all(SIZES[arguments.size], load_domains(arguments.text), results, place, only, deadline)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    from benchmarks.experts.report import write_report

    for path in write_report(arguments.size, results):
        print(path)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("size", choices=SIZES)
    add("--text", type=Path, help="folder of .txt files, each of which is a domain of English")
    add(
        "--only",
        nargs="*",
        metavar="TEXT",
        help="runs in which one of these occurs, such as seed=1 or 'PSO, per layer'",
    )
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    add("--report", action="store_true", help="only draw the table")
    add("--results", type=Path, default=FOLDER, help="folder of the table")
    add("--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "experts", help="folder of the experts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
