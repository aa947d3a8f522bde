"""``python -m benchmarks.slow_link``: training over a slow link, in ds_pso and in its peers."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.slow_link.network import Link, slow_link, why_not
from benchmarks.slow_link.report import write_report
from benchmarks.slow_link.results import Measured, SlowLinkTable
from benchmarks.slow_link.runs import BANDWIDTHS, Run, runs
from benchmarks.slow_link.worker import MARK
from benchmarks.table import versions

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
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
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
    with slow_link(BANDWIDTHS[run.bandwidth]) as link, tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{end}.log") for end in range(2)]  # a pipe that nobody reads would fill
        ends = [_start(link, end, run, log) for end, log in enumerate(logs)]
        deadline = time.monotonic() + LIMIT_S
        try:
            for end in ends:
                end.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for end in ends:
                if end.poll() is None:
                    os.killpg(end.pid, signal.SIGKILL)
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    found = [json.loads(line.split(MARK)[1]) for text in texts for line in text.splitlines() if MARK in line]
    if len(found) < 2:
        raise RuntimeError("no result:\n" + "\n".join(text[-2000:] for text in texts))
    return Measured(
        step_s=max(end["step_s"] for end in found),
        bytes_per_step=max(end["bytes_per_step"] for end in found),
        steps_per_sync=max(end["steps_per_sync"] for end in found),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        versions=f"{versions()}{_version_of('torchft')}{_version_of('accelerate')}",
    )


def _version_of(package: str) -> str:
    try:
        return f", {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _start(link: Link, end: int, run: Run, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(end),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": link.addresses[0],
        "MASTER_PORT": "29500",
        "ADDRESS": link.addresses[end],
        "GLOO_SOCKET_IFNAME": "slow0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = link.command(end, sys.executable, "-m", "benchmarks.slow_link.worker", json.dumps(asdict(run)))
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_link", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the runs whose line contains TEXT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--report", action="store_true", help="only draw")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
