"""Keeps processes busy with the runs that are missing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

from benchmarks.convergence.run import quieten
from benchmarks.levers.results import Outcome, Results, Run
from benchmarks.levers.search import missing
from benchmarks.levers.settings import SEEDS, Setting, Size
from benchmarks.levers.train import simulate


@dataclass(frozen=True)
class Limits:
    """How long, how many at once, and how many seeds of a setting whose rate is known."""

    deadline: float  # time.time() after which no run is started
    jobs: int
    seeds: int


def run_all(size: Size, settings: Sequence[Setting], results: Results, limits: Limits) -> None:
    """Run until nothing is missing, or time is up; each run in a process of its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # Muon would compile for half a minute, in each process
    by_name = {str(setting): setting for setting in settings}
    running: dict[Future[Outcome], Run] = {}
    failed: set[Run] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(limits.jobs, context, _begin_worker, max_tasks_per_child=1) as pool:
        while True:
            for run in missing(settings, results.rows, seeds=limits.seeds):
                tuned_now = {other.setting for other in running.values() if other.seed == SEEDS[0]}
                is_open = run not in failed and run not in running.values()
                if run.seed == SEEDS[0] and run.setting in tuned_now:
                    is_open = False  # what comes of it says which rate is next
                if is_open and len(running) < limits.jobs and time.time() < limits.deadline:
                    running[pool.submit(_train, size, by_name[run.setting], run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    results.add(run, future.result())
                    print(f"{run}: {results.rows[run].loss:.4f}, {results.rows[run].seconds:.0f} s", flush=True)
                except Exception:
                    failed.add(run)
                    print(f"{run}: FAILED\n{traceback.format_exc()}", flush=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    quieten()


def _train(size: Size, setting: Setting, run: Run) -> Outcome:
    return simulate(size, setting, run)
