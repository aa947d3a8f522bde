"""``python -m benchmarks.levers SIZE``: find the best learning rate of each setting, then run it with more seeds."""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.levers.report import write_report
from benchmarks.levers.results import Results
from benchmarks.levers.run import Limits, run_all
from benchmarks.levers.settings import SEEDS, SETTINGS, SIZES


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    results = Results(arguments.size)
    if not arguments.report:
        names = {str(setting) for setting in SETTINGS}
        texts = arguments.only or [""]
        wanted = [s for s in SETTINGS if str(s) in texts or any(text in str(s) for text in texts if text not in names)]
        try:
            limits = Limits(time.time() + 60 * arguments.minutes, arguments.jobs, arguments.seeds)
            run_all(SIZES[arguments.size], wanted, results, limits)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    for path in write_report(arguments.size, results):
        print(path)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("size", choices=SIZES)
    add("--only", nargs="*", metavar="TEXT", help="settings of these names, or in whose name one of these occurs")
    add("--seeds", type=int, default=len(SEEDS), help="of each setting whose rate is known (default: all)")
    add("--minutes", type=float, default=float("inf"), help="start no run after this time")
    add("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    add("--report", action="store_true", help="only draw the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
