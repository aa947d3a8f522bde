"""Runs cells one after the other: simulated, in worker processes, or real, in the ranks of a launcher."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers

import ds_pso
from benchmarks.convergence.cells import Cell
from benchmarks.convergence.data import load
from benchmarks.convergence.results import Outcome, Results
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.train import clean_up, config_of, train
from ds_pso.distributed.world import World

_CELLS_PER_PROCESS = 100  # a fresh process now and then, whatever the libraries may keep


@dataclass(frozen=True)
class Limits:
    """When to stop, and where the data are."""

    deadline: float = float("inf")  # time.time() after which no cell is started
    jobs: int = 1
    folder: Path | None = None


class _Log:
    """A line for each finished run, with the time that the others will take."""

    def __init__(self, num_cells: int) -> None:
        self._num_cells, self._done, self._begin = num_cells, 0, time.time()

    def line(self, cell: Cell, outcome: Outcome | str) -> None:
        self._done += 1
        left = (time.time() - self._begin) / self._done * (self._num_cells - self._done)
        what = outcome if isinstance(outcome, str) else _describe(cell, outcome)
        print(f"[{self._done}/{self._num_cells}] {cell}: {what}; {left / 60:.0f} min left", flush=True)


def _describe(cell: Cell, outcome: Outcome) -> str:
    accuracy = f"accuracy {outcome.accuracy:.4f}, " if TASKS[cell.task].metric == "accuracy" else ""
    return f"{accuracy}loss {outcome.loss:.4f}, {outcome.seconds:.1f} s"


# -- simulated ----------------------------------------------------------------------------------


def simulate_all(cells: Sequence[Cell], results: Results, limits: Limits) -> int:
    """Run the cells in ``limits.jobs`` processes; returns how many failed."""
    log, failed = _Log(len(cells)), 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or each worker would say that it found nothing better
    context = multiprocessing.get_context("spawn")
    # Leaving the block, also by Ctrl-C, ends the workers at once.
    with context.Pool(limits.jobs, _begin_worker, maxtasksperchild=_CELLS_PER_PROCESS) as pool:
        pool.apply(_prepare, (sorted({TASKS[cell.task].data for cell in cells}), limits))
        for cell, outcome in pool.imap_unordered(_simulate, [(cell, limits) for cell in cells]):
            if isinstance(outcome, Outcome):
                results.add(cell, outcome)
            if outcome is not None:
                failed += isinstance(outcome, str)
                log.line(cell, outcome)
        pool.close()
        pool.join()
    return failed


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    quieten()


def _prepare(names: Sequence[str], limits: Limits) -> None:
    """Bring the data to the disk before several processes look for them."""
    ds_pso.simulate({"swarm": {"particles": 1}}, lambda swarm: [load(swarm, name, limits.folder) for name in names])


def _simulate(job: tuple[Cell, Limits]) -> tuple[Cell, Outcome | str | None]:
    """The outcome of a cell, the error it ended with, or None if there is no time left."""
    cell, limits = job
    if time.time() > limits.deadline:
        return cell, None
    config = config_of(cell, world_size=cell.num_worlds, zero_stage=0)
    try:
        outcomes = ds_pso.simulate(config, lambda swarm: train(swarm, cell, limits.folder))
    except Exception:
        return cell, f"FAILED\n{traceback.format_exc()}"
    finally:
        clean_up()
    return cell, outcomes[0]


# -- real ---------------------------------------------------------------------------------------


class Launch:
    """The ranks of one launch. DeepSpeed's world cannot be built twice, so all their runs have as many particles."""

    def __init__(self) -> None:
        self._world: World | None = None

    def run_all(self, cells: Sequence[Cell], results: Results, limits: Limits) -> int:
        """Run the cells that fit; called on all ranks; rank 0 writes. Returns how many failed: an error ends it."""
        quieten()
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if self._world is None else self._world.layout.world_size
        fitting = [cell for cell in cells if world_size % cell.num_worlds == 0 and cell.batch % world_size == 0]
        if self._world is not None:
            particles = self._world.layout.num_particles
        else:
            particles = min((cell.num_worlds for cell in fitting), default=1)
        now = [cell for cell in fitting if cell.num_worlds == particles]
        log = _Log(len(now))
        for cell in now:
            swarm = ds_pso.init(config_of(cell, world_size, zero_stage=2), world=self._world)
            self._world = swarm.world
            if not swarm.world.coordinator.gather("time left", time.time() < limits.deadline)[0]:
                break
            outcome = train(swarm, cell, limits.folder)
            if swarm.is_leader:
                results.add(cell, outcome)
                log.line(cell, outcome)
            results.rows[cell] = outcome  # the other ranks must find the same learning rates
            del swarm
            clean_up()
        if self._world is not None and self._world.is_leader and len(fitting) > len(now):
            print(f"{len(fitting) - len(now)} runs have other numbers of particles; start the same command again")
        return 0

    def close(self) -> None:
        if self._world is not None:
            self._world.close()


def quieten() -> None:
    """Only what a person needs: our own lines."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # DeepSpeed would compile a shared-memory all-reduce at start-up; gloo serves as well here.
    ops: dict[str, Any] = deepspeed.ops.__compatible_ops__
    ops["deepspeed_shm_comm"] = False
