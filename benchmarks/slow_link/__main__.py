"""``python -m benchmarks.slow_link``: training over a slow link, in ds_pso and in its peers."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict

from benchmarks.slow_link.ends import run_ends
from benchmarks.slow_link.network import slow_link, why_not
from benchmarks.slow_link.report import write_report
from benchmarks.slow_link.results import Measured, SlowLinkTable
from benchmarks.slow_link.runs import BANDWIDTHS, Run, runs
from benchmarks.table import machine, versions

LIMIT_S = 600.0  # of one run


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    table = SlowLinkTable()
    reason = why_not()
    if reason and not arguments.report:
        print(f"slow_link: skipped: {reason}", file=sys.stderr)
        return 0
    failed = 0
    if not arguments.report:
        wanted = [run for number in range(arguments.runs) for run in runs(number)]
        missing = [run for run in wanted if run not in table.rows and arguments.only in str(run)]
        if importlib.util.find_spec("torchft") is None:
            print("slow_link: without torchft; to compare with it: pip install torchft==0.2.0", file=sys.stderr)
            missing = [run for run in missing if run.stack != "torchft"]
        deadline = time.time() + 60 * arguments.minutes
        for count, run in enumerate(missing, 1):
            if time.time() > deadline:
                break
            try:
                measured = measure(run)
            except (RuntimeError, ValueError) as error:
                failed += 1
                print(f"[{count}/{len(missing)}] {run}: failed: {error}", file=sys.stderr, flush=True)
                continue
            table.add(run, measured)
            print(f"[{count}/{len(missing)}] {run}: {measured.step_s:.3f} s a step", flush=True)
    for path in write_report(table) if table.rows else []:
        print(path)
    return 1 if failed else 0


def measure(run: Run) -> Measured:
    """Both ends at once, a core each; the slower one counts."""
    with slow_link(BANDWIDTHS[run.bandwidth]) as link:
        found = run_ends(link, "benchmarks.slow_link.worker", json.dumps(asdict(run)), LIMIT_S)
    return Measured(
        step_s=max(end["step_s"] for end in found),
        bytes_per_step=max(end["bytes_per_step"] for end in found),
        machine=machine(),
        versions=f"{versions()}{_version_of('torchft')}{_version_of('accelerate')}",
        steps_per_sync=max(end["steps_per_sync"] for end in found),
        loss=statistics.fmean(end["loss"] for end in found),
        steps=max(end["steps"] for end in found),
    )


def _version_of(package: str) -> str:
    try:
        return f", {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_link", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the runs whose line contains TEXT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--report", action="store_true", help="only draw")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
