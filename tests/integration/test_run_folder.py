"""Two runs with one run folder: the second is told at once, on all its ranks, and the first is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

import ds_pso
from ds_pso import ConfigError
from ds_pso.utils.folder_lock import NAME

from .jobs import Case, config, place, swarm_of, train

CASE = Case()
HOLD = """
import pathlib, sys, time
from ds_pso.utils.folder_lock import lock_folder
lock = lock_folder(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(200)
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[int]:
    """The pid of a process that holds ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process.pid
        finally:
            process.kill()


def join(case: Case, folder: Path) -> tuple[str, str | None, bool]:
    """The error of ``ds_pso.init``, and what it has left of the environment; then without that folder."""
    ds_pso.swarm._PATIENCE_S = 0.3
    try:
        ds_pso.init(config(case, place(case)[2]), run_dir=folder)
    except ConfigError as error:
        said, agreed = str(error), error.agreed
    world_size = os.environ.get("WORLD_SIZE")
    with swarm_of(case) as (_, engine):
        train(case, engine, range(2))
    return said, world_size, agreed


def test_the_second_run_is_told_on_every_rank(pool: Pool, tmp_path: Path, other_run: int) -> None:
    for said, world_size, agreed in pool.run(join, CASE, tmp_path / "run"):
        assert f"{tmp_path / 'run'}: another run writes into this folder (process {other_run} on " in said
        assert agreed
        assert world_size == "4", "the environment is the launcher's again"


def main(arguments: list[str]) -> int:
    from ds_pso.training.job import main

    ds_pso.swarm._PATIENCE_S = 0.3
    return main(arguments)


def test_train_py_renames_no_folder_of_a_run_that_lives(pool: Pool, tmp_path: Path, other_run: int) -> None:
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert pool.run(main, ["--output_dir", str(tmp_path / "run")], world_size=2, timeout=120) == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [NAME, "metrics.jsonl"]


def runs_that_follow(case: Case, folder: Path) -> list[bool]:
    """Whether the folder is locked in a run, in one that takes up its world, and after it; only the leader names it."""
    rank, found = int(os.environ["RANK"]), []
    for _ in range(2):
        mine = folder if rank == 0 else None
        with ds_pso.init(config(case, place(case)[2]), run_dir=mine) as swarm:
            swarm.log("mine")
            found.append((folder / NAME).exists())
            with ds_pso.init(config(case, place(case)[2]), run_dir=mine, world=swarm.world):
                found.append((folder / NAME).exists())
            found.append((folder / NAME).exists())
        found.append((folder / NAME).exists())
    return found


def test_runs_of_one_process_follow_each_other(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(runs_that_follow, CASE, tmp_path / "run")
    assert found[0] == [True, True, True, False] * 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_particles_of_a_simulation_share_one(tmp_path: Path) -> None:
    section = {"train_micro_batch_size_per_gpu": 1, "swarm": {"particles": 3}}
    lock = tmp_path / "run" / NAME
    for _ in range(2):
        found = ds_pso.simulate(section, lambda swarm: swarm.gather(lock.exists()), run_dir=tmp_path / "run")
        assert found == [[1.0] * 3] * 3
        assert not (tmp_path / "run").exists(), "nothing was written there"
