"""A checkpoint that is written while training goes on is the one of the step at which it was begun, or is not there."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from variants import slow_but

from ds_pso import CheckpointError
from ds_pso.checkpoint import saving, writer
from ds_pso.swarm import Swarm

from .jobs import Case, swarm_of, train
from .test_resume import BASE, HALF, LATER_RULES, STEPS, assert_same, job, train_from_loader

RULE = {"inertia": 0.3, "cognitive": 0.5}
CASES = {
    "zero0": replace(BASE, stage=0, sync_mode="diloco"),
    "zero2": replace(BASE, stage=2, sync_mode="pso", options=RULE),
    "zero3": replace(BASE, stage=3, sync_mode="diloco"),
    "a sync point pending": replace(LATER_RULES["delay"], stage=3, dropout=0.3, batch_norm=True),
    "another one pending": replace(LATER_RULES["streaming"], stage=2, dropout=0.3, batch_norm=True),
    "fp16": replace(HALF, stage=2, precision="fp16", sync_mode="diloco"),
    "offload": replace(HALF, stage=3, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
}


def save_late(case: Case, folder: Path) -> Any:
    """As ``job``, which saves at step 3; but nothing is written before training has come to its end."""
    with swarm_of(case) as (swarm, engine):
        real, save = writer.Copies.write, swarm.save
        done = folder.parent / f"done {swarm.world.layout.rank}"

        def write(copies: Any) -> list[Path]:
            while not done.exists():
                time.sleep(0.01)
            return real(copies)

        writer.Copies.write = write
        swarm.save = lambda folder: save(folder, background=True)
        import random

        import numpy as np

        random.seed(swarm.world.layout.rank)
        np.random.seed(swarm.world.layout.rank)
        result = train_from_loader(case, swarm, engine, STEPS, folder, 3)
        assert not (folder / "latest").exists()
        done.touch()
        swarm.wait_for_save()
        assert (folder / "latest").read_text() == "step_00000003"
    return result


@pytest.mark.parametrize("name", slow_but(("another one pending",), CASES))
def test_training_meanwhile_does_not_show(pool: Pool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    truth = pool.run(job, case, STEPS, None, None)  # undisturbed
    folder = tmp_path / "run"
    assert_same(pool.run(save_late, case, folder), truth)
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, folder, None), truth)


# -- one at a time ------------------------------------------------------------------------------------


def save_often(case: Case, folder: Path) -> list[str]:
    """What there is after a save."""
    found: list[str] = []
    with swarm_of(case) as (swarm, engine):
        for step in range(4):
            train(case, engine, range(step, step + 1))
            swarm.save(folder, keep=2, background=step != 2)
            if step == 2:
                swarm.world.coordinator.gather("looking", None)
                found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
                swarm.world.coordinator.gather("has looked", None)
    return found


def test_each_save_waits_for_the_one_before(pool: Pool, tmp_path: Path) -> None:
    for rank in pool.run(save_often, Case(), tmp_path):
        assert rank == ["latest", "step_00000002", "step_00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]


# -- killed while writing -----------------------------------------------------------------------------

STEP_2, STEP_4 = "step_00000002", "step_00000004"
# At which call the process is killed, and what is resumed from then.
MOMENTS = {
    "before the first byte": ("Copies.write", 0, STEP_2),
    "DeepSpeed's files are there": ("save_file", 0, STEP_2),
    "while hashing": ("hash_file", 1, STEP_2),
    "before the record": ("write_atomically", 0, STEP_2),
    "all have written": ("replace_folder", 0, STEP_2),
    "the leader has renamed": ("write_atomically, leader", 1, STEP_2),
    "before old ones are removed": ("prune", 0, STEP_4),
    "while old ones are removed": ("shutil.rmtree", 3, STEP_4),
}


def kill_at(moment: str, swarm: Swarm) -> None:
    """From now on: SIGKILL at that call."""
    what, number, _ = MOMENTS[moment]
    if what.endswith("leader") and not swarm.is_leader:
        return
    owner: Any = {"Copies.write": writer.Copies, "shutil.rmtree": writer.shutil}.get(what)
    owner = owner or (saving if what == "prune" else writer)
    name = what.split(",")[0].split(".")[-1]
    real, calls = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(owner, name, call)


def save_and_be_killed(case: Case, folder: Path, moment: str) -> None:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(range(64))
        train(case, engine, range(2))
        swarm.save(folder, keep=1)
        train(case, engine, range(2, 4))
        swarm.world.coordinator.leads_disk = lambda _: swarm.is_leader  # it removes files, too
        kill_at(moment, swarm)
        swarm.save(folder, keep=1, background=True)
        train(case, engine, range(4, 6))
        swarm.wait_for_save()


def load_each(case: Case, folders: list[Path]) -> list[str]:
    """The step that each is resumed from, and that it can be saved to again."""
    found: list[str] = []
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(range(64))
        for folder in folders:
            step = swarm.load(folder)
            train(case, engine, range(step, 5))
            swarm.save(folder, keep=1, background=True)
            found.append(f"step_{step:08d}")
    return found


@pytest.mark.slow
def test_killed_while_writing(pool: Pool, tmp_path: Path) -> None:
    case = Case(sync_mode="pso", options=RULE, swarm={"timeout_s": 20})
    folders = [tmp_path / moment for moment in MOMENTS]
    for folder, moment in zip(folders, MOMENTS, strict=True):
        leader, *_ = pool.outcomes(save_and_be_killed, case, folder, moment, silent=(1, 2, 3))
        assert leader.kind == "Killed", (moment, leader)
    for found in pool.run(load_each, case, folders):
        assert dict(zip(MOMENTS, found, strict=True)) == {name: expected for name, (_, _, expected) in MOMENTS.items()}
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000005"]


# -- an error in the background -------------------------------------------------------------------------


def fail_and_go_on(case: Case, folder: Path, who_waits: str) -> str:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(1))
        swarm.save(folder)
        real = writer.save_file

        def no_space(*_: Any) -> None:
            raise OSError(28, "No space left on device", "disk")

        if swarm.world.layout.rank == 2:
            writer.save_file = no_space
        train(case, engine, range(1, 2))
        swarm.save(folder, background=True)
        train(case, engine, range(2, 3))
        try:
            {
                "save": lambda: swarm.save(folder),
                "load": lambda: swarm.load(folder),
                "export": lambda: swarm.export(folder / "model"),
                "close": swarm.close,
            }[who_waits]()
        except CheckpointError as error:
            text = str(error)
        else:
            return "no error"
        if who_waits != "close":
            writer.save_file = real
            swarm.save(folder)  # said once, and forgotten
            swarm.close()
        return text


@pytest.mark.parametrize(
    "who_waits", ["save", "close", *[pytest.param(who, marks=pytest.mark.slow) for who in ("load", "export")]]
)
def test_an_error_in_the_background_is_raised_by_the_next_call(pool: Pool, tmp_path: Path, who_waits: str) -> None:
    texts = pool.run(fail_and_go_on, Case(), tmp_path, who_waits)
    assert len(set(texts)) == 1
    assert "disk: cannot write the checkpoint (No space left on device)" in texts[0]
    expected = "step_00000001" if who_waits == "close" else "step_00000003"
    assert (tmp_path / "latest").read_text() == expected
