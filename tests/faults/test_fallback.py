"""When the newest checkpoint is damaged, whatever file it is, all ranks resume from the one before it, and say so."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from integration.jobs import Case, config, place, swarm_of, train
from pool import Pool

import ds_pso
from ds_pso import CheckpointError
from ds_pso.checkpoint.fetching import newest
from ds_pso.errors import SwarmError

from .test_bad_checkpoints import DATA, everything, write

CASE = Case(sync_mode="pso", options={"inertia": 0.3}, batch_norm=True, swarm={"timeout_s": 20})
STEPS = ["step_00000002", "step_00000003", "step_00000005"]
OLDER, NEWEST = STEPS[-2:]


def save_three(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(DATA)
        for begin, end in ((0, 2), (2, 3), (3, 5)):
            train(case, engine, range(begin, end))
            swarm.save(folder, background=end == 5)


@pytest.fixture(scope="module")
def good(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "run"
    pool.run(save_three, CASE, folder)
    return folder


def copy_of(good: Path, folder: Path) -> Path:
    """Made of links, so do not write into a file: replace it."""
    shutil.copytree(good, folder, copy_function=os.link)
    return folder


Damage = Callable[[bytes], bytes | None]


def flip(place: float) -> Damage:
    def damage(content: bytes) -> bytes:
        at = min(int(len(content) * place), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return damage


DAMAGES: dict[str, Damage] = {
    "gone": lambda _: None,
    "empty": lambda _: b"",
    "cut in the middle": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    **{f"bit flip at {place}": flip(place) for place in (0.0, 0.01, 0.3, 0.5, 0.8, 1.0)},
}


def damaged_copies(good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """(which file, the copy in which it is damaged): all files, in all ways."""
    names = sorted(str(path.relative_to(good / NEWEST)) for path in (good / NEWEST).rglob("*") if path.is_file())
    for number, name in enumerate(names):
        for kind, damage in DAMAGES.items():
            copy = copy_of(good, folder / f"{number} {kind}")
            path = copy / NEWEST / name
            content = damage(path.read_bytes())
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            yield name, copy


def choose(case: Case, folders: list[Path]) -> list[tuple[str, list[str]]]:
    """For each folder what is resumed from, or the error; and the warnings."""
    found = []
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        for folder in folders:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    name = newest(swarm.session, folder, reshape=False)
                except SwarmError as error:
                    name = f"{type(error).__name__}: {error}"
            found.append((name, [str(warning.message) for warning in caught]))
    return found


def test_any_damage_to_any_file_is_seen(pool: Pool, good: Path, tmp_path: Path) -> None:
    names, folders = zip(*damaged_copies(good, tmp_path), strict=True)
    kinds = {Path(name).suffix for name in names}
    assert kinds == {".pt", ".py", ".json", ".safetensors"}, "another kind of file: is it checked?"
    leader, *others = pool.run(choose, CASE, [good, *folders], timeout=200)
    assert leader[0] == (NEWEST, [])
    for name, folder, (found, said) in zip(names, folders, leader[1:], strict=True):
        assert found == OLDER, f"{folder.name}: {name}"
        assert len(said) == 1, folder
        assert str(folder / NEWEST / name) in said[0], folder
        assert f"resuming from {folder / OLDER} instead" in said[0]
    for rank in others:
        assert rank == [(found, []) for found, _ in leader]


def point_at(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "latest").unlink()
        write("latest", text)(folder)

    return damage


# What is done to the folder -> what is resumed from
POINTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda folder: (folder / "latest").unlink(), NEWEST),
    "empty": (point_at(""), NEWEST),
    "names nothing": (point_at("step_00000099"), NEWEST),
    "names a path": (point_at("../run"), NEWEST),
    "names an older one": (point_at(OLDER), OLDER),  # as after a kill between the rename and it
    "the newest is gone": (lambda folder: shutil.rmtree(folder / NEWEST), OLDER),
    "two are gone": (lambda folder: [shutil.rmtree(folder / name) for name in (OLDER, NEWEST)], STEPS[0]),
    "two without records": (lambda folder: [shutil.rmtree(folder / name / "swarm") for name in STEPS[1:]], STEPS[0]),
}


def test_without_a_pointer_the_newest_counts(pool: Pool, good: Path, tmp_path: Path) -> None:
    folders = [copy_of(good, tmp_path / name) for name in POINTERS]
    for folder, (damage, _) in zip(folders, POINTERS.values(), strict=True):
        damage(folder)
    leader, *others = pool.run(choose, CASE, folders)
    for (name, (_, expected)), (found, said) in zip(POINTERS.items(), leader, strict=True):
        assert found == expected, name
        assert len(said) == (name != "names an older one"), said
    assert all([found for found, _ in rank] == [found for found, _ in leader] for rank in others)


def test_the_error_lists_what_is_wrong_with_each(pool: Pool, good: Path, tmp_path: Path) -> None:
    folder = copy_of(good, tmp_path / "run")
    files = ["swarm/rank_00002.json", "particle_1/zero_to_fp32.py", "swarm/rank_00000.safetensors"]
    for step, name in zip(STEPS, files, strict=True):
        (folder / step / name).unlink()
    for ((text, said),) in pool.run(choose, CASE, [folder]):
        assert text.startswith("CheckpointError")
        assert "no checkpoint to resume is whole" in text
        assert all(str(folder / step / name) in text for step, name in zip(STEPS, files, strict=True))
        assert not said


def state_after_loading(case: Case, folder: Path, tags: list[str | None]) -> list[tuple[int | str, str]]:
    """For each tag: the step, or the error; and all that a load changes."""
    found: list[tuple[int | str, str]] = []
    with swarm_of(case, run_dir=folder.with_suffix(".log")) as (swarm, engine):
        swarm.sampler(DATA)
        for tag in tags:
            step: int | str
            try:
                step = swarm.load(folder, tag)
            except CheckpointError as error:
                step = str(error)
            found.append((step, everything(swarm, engine)))
    return found


def test_the_one_before_is_loaded_as_if_it_had_been_named(pool: Pool, good: Path, tmp_path: Path) -> None:
    folder = copy_of(good, tmp_path / "run")
    (folder / NEWEST / "particle_1/deepspeed/mp_rank_00_model_states.pt").unlink()
    for named, fallen_back, damaged in pool.run(state_after_loading, CASE, folder, [OLDER, None, NEWEST]):
        assert fallen_back == named
        assert named[0] == 3
        assert "missing; resume from another step_* folder" in str(damaged[0])


def test_what_does_not_fit_is_an_error(pool: Pool, good: Path, tmp_path: Path) -> None:
    """Though an older one would fit: somebody has mixed two runs up."""
    folder = copy_of(good, tmp_path / "run")
    shutil.rmtree(folder / NEWEST)
    pool.run(save_three, replace(CASE, sync_mode="local_sgd", options={}), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / NEWEST, folder / NEWEST)
    for ((error, _),) in pool.run(state_after_loading, CASE, folder, [None]):
        assert "saved with sync_mode local_sgd, and this run has pso" in str(error)
