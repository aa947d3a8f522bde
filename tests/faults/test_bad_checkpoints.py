"""A checkpoint that is missing, damaged or of another swarm stops all ranks with the same words.

The engine stays as it was, and so do the checkpoints on disk.
"""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.jobs import Case, optimizer_state, swarm_of, train, working_weights
from pool import Pool
from variants import slow_but

from ds_pso import CheckpointError
from ds_pso.checkpoint import writer
from ds_pso.checkpoint.format import record_checksum
from ds_pso.swarm import Swarm
from ds_pso.utils.atomic_io import hash_file

CASE = Case(sync_mode="pso", options={"inertia": 0.3, "cognitive": 0.5}, batch_norm=True, swarm={"timeout_s": 20})
STEP = "step_00000003"
DATA = range(64)


def save_one(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(DATA)
        train(case, engine, range(3))
        swarm.save(folder)


@pytest.fixture(scope="module")
def good(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one checkpoint of CASE."""
    folder = tmp_path_factory.mktemp("good")
    pool.run(save_one, CASE, folder)
    return folder


def everything(swarm: Swarm, engine: Any) -> str:
    """All that a load changes."""
    rule = [{k: v.tolist() for k, v in state.items()} for state in swarm.session.synchronizer.parts.updater.state]
    weights = {name: value.tolist() for name, value in working_weights(engine).items()}
    moments = {name: value.tolist() for name, value in optimizer_state(engine).items()}
    samplers = [sampler.state_dict() for sampler in swarm.session.samplers]
    rest = [swarm.session.window.total, swarm.totals, swarm.last_losses, engine.global_steps, random.getstate()]
    return repr([rule, weights, moments, samplers, rest, torch.get_rng_state().tolist()])


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def try_to_load(case: Case, folders: list[Path], tag: str | None, data: range) -> list[tuple[str, str, bool]]:
    """For each folder: the error's type and text, and whether the engine is as before."""
    found = []
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(data)
        train(case, engine, range(1))
        before = everything(swarm, engine)
        for folder in folders:
            kind, text = "", ""
            try:
                swarm.load(folder, tag)
            except CheckpointError as error:
                kind, text = type(error).__name__, str(error)
            found.append((kind, text, everything(swarm, engine) == before))
        train(case, engine, range(1, 3))  # and goes on
    return found


def assert_refused(ranks: list[list[tuple[str, str, bool]]], texts: list[str]) -> None:
    for rank in ranks:
        assert rank == ranks[0], "the ranks do not agree"
        for (kind, text, unchanged), expected in zip(rank, texts, strict=True):
            assert kind == "CheckpointError", f"expected {expected!r}, got {kind} {text}"
            assert expected in text
            assert unchanged, f"the load that said {text!r} changed the engine"


# -- damage ---------------------------------------------------------------------------------------


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = next(folder.glob(pattern))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    return damage


def flip(pattern: str, place: float) -> Callable[[Path], None]:
    """Flip the lowest bit of one byte."""

    def damage(folder: Path) -> None:
        path = next(folder.glob(pattern))
        content = bytearray(path.read_bytes())
        content[int(len(content) * place)] ^= 1
        path.write_bytes(content)

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def change_record(key: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / STEP / "swarm/rank_00001.json"
        record = json.loads(path.read_text()) | {key: value}
        if key == "format":  # as another version would have written it
            del record["checksum"]
            record["checksum"] = record_checksum(record)
        path.write_text(json.dumps(record))

    return damage


RECORD, TENSORS = f"{STEP}/swarm/rank_00002.json", f"{STEP}/swarm/rank_00001.safetensors"
MODEL, OPTIMIZER = f"{STEP}/particle_1/deepspeed/mp_rank_*", f"{STEP}/particle_0/deepspeed/zero_pp_rank_1_*optim*"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no checkpoint to resume"),
    "no step folder": (remove(STEP), "no checkpoint to resume"),
    "record gone": (remove(RECORD), "cannot be read"),
    "record cut": (cut(RECORD), "damaged"),
    "record is no JSON": (write(RECORD, "rubbish"), "damaged"),
    "record is another JSON": (write(RECORD, "[1, 2]"), "damaged"),
    "record of another format": (change_record("format", 99), "format 99 is not"),
    **{f"record, bit flip at {place}": (flip(RECORD, place), "damaged") for place in (0.05, 0.3, 0.6, 0.95)},
    "record edited": (change_record("window", [1.0, 1]), "damaged"),
    "tensors gone": (remove(TENSORS), "missing"),
    "tensors cut": (cut(TENSORS), "cut short"),
    "tensors, bit flip": (flip(TENSORS, 0.9), "checksum differs"),
    "model gone": (remove(MODEL), "missing"),
    "model cut": (cut(MODEL), "cut short"),
    "model, bit flip": (flip(MODEL, 0.5), "checksum differs"),
    "optimizer gone": (remove(OPTIMIZER), "missing"),
    "optimizer cut": (cut(OPTIMIZER), "cut short"),
    "optimizer, bit flip": (flip(OPTIMIZER, 0.5), "checksum differs"),
    "particle gone": (remove(f"{STEP}/particle_1"), "missing"),
}


@pytest.mark.parametrize("tag", slow_but([None], [None, STEP]))
def test_damaged_checkpoints_are_refused(pool: Pool, good: Path, tmp_path: Path, tag: str | None) -> None:
    folders = []
    for number, (damage, _) in enumerate(DAMAGE.values()):
        folder = tmp_path / str(number) / "run"
        shutil.copytree(good, folder)
        damage(folder)
        folders.append(folder)
    before = [tree(folder) for folder in folders]
    ranks = pool.run(try_to_load, CASE, folders, tag, DATA, timeout=120)
    texts = [text for _, text in DAMAGE.values()]
    assert_refused(
        ranks, texts if tag is None else [text.replace("no checkpoint to resume", "no such") for text in texts]
    )
    assert [tree(folder) for folder in folders] == before


def test_a_tag_that_is_not_there(pool: Pool, good: Path) -> None:
    assert_refused(pool.run(try_to_load, CASE, [good], "step_00000042", DATA), ["name one of the step_* folders"])


# -- another swarm ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    text: str
    case: Case = CASE
    world_size: int = 4
    data: range = DATA


OTHERS = {
    "particles": Other("saved with num_particles 2", replace(CASE, particles=4)),
    "fewer ranks": Other("saved with particle_size 2", CASE, world_size=2),
    "more particles": Other("saved with num_particles 2, and this run has 3", replace(CASE, particles=3), world_size=6),
    "rule": Other("saved with sync_mode pso", replace(CASE, sync_mode="diloco", options={})),
    "wire": Other("saved with wire fp32", replace(CASE, swarm=CASE.swarm | {"wire": "int8"})),
    "turns": Other(
        "saved with turns 1, and this run has 2",
        replace(CASE, interval=4, swarm=CASE.swarm | {"streaming": True, "fragments": 2, "delay": 1}),
    ),
    "options": Other("as configured now", replace(CASE, options={"cognitive": 0.5})),
    "stage": Other("saved with zero_stage 2", replace(CASE, stage=1)),
    "precision": Other("saved with model", replace(CASE, precision="bf16", batch_norm=False)),
    "model": Other("saved with model", replace(CASE, batch_norm=False)),
    "groups": Other("saved with model", replace(CASE, groups=2)),
    "data": Other("the data's dataset_size was 64 and is 80 now", CASE, data=range(80)),
}


@pytest.mark.parametrize("name", slow_but(["rule", "particles", "model"], OTHERS))
def test_a_checkpoint_of_another_swarm_is_refused(pool: Pool, good: Path, name: str) -> None:
    other = OTHERS[name]
    ranks = pool.run(try_to_load, other.case, [good], None, other.data, world_size=other.world_size)
    assert_refused(ranks, [other.text])


# -- saving that fails --------------------------------------------------------------------------------


def fill_the_disk(where: str, swarm: Swarm) -> None:
    """From now on writing fails, as on a full disk."""
    if where == "all ranks":
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # bytes a file
    if where == "rank 3" and swarm.world.layout.rank == 3:

        def no_space(tensors: Any, path: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", path)

        writer.save_file = no_space
    if where == "leader, at the end" and swarm.is_leader:

        def denied(*_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "latest")

        writer.replace_folder = denied


def save_and_fail(case: Case, folder: Path, where: str, background: bool) -> str:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(DATA)
        train(case, engine, range(3))
        swarm.save(folder)
        train(case, engine, range(3, 4))
        before = everything(swarm, engine)
        fill_the_disk(where, swarm)
        try:
            swarm.save(folder / "file" if where == "no folder" else folder, background=background)
            swarm.wait_for_save()
        except CheckpointError as error:
            assert everything(swarm, engine) == before
            train(case, engine, range(4, 5))  # the swarm is as it was
            return str(error)
    return "saved"


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "background"])
@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("rank 3", "No space left on device"),
        ("leader, at the end", "Permission denied"),
        pytest.param("all ranks", "cannot write the checkpoint", marks=pytest.mark.slow),
        pytest.param("no folder", "cannot write the checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_save_that_fails_leaves_the_last_one(
    pool: Pool, tmp_path: Path, where: str, text: str, background: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "file").write_text("in the way")
    texts = pool.run(save_and_fail, CASE, folder, where, background)
    for message in texts:
        assert text in message
        assert "free some space or choose another folder" in message
    if background or where != "all ranks":  # in the foreground each hears it from its own DeepSpeed
        assert len(set(texts)) == 1, "the ranks do not agree"
    assert (folder / "latest").read_text() == STEP
    assert pool.run(resume, CASE, folder) == [3] * 4


def resume(case: Case, folder: Path) -> int:
    with swarm_of(case) as (swarm, engine):
        swarm.sampler(DATA)
        step = swarm.load(folder)
        train(case, engine, range(step, step + 1))
        return step


def disk_of_one_rank_full(case: Case, folder: Path) -> None:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))
        if swarm.world.layout.rank == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        swarm.save(folder)


@pytest.mark.slow
def test_one_rank_fails_inside_deepspeed(pool: Pool, tmp_path: Path) -> None:
    """DeepSpeed's save has collectives of its own: the others learn of it when the rank leaves."""
    case = replace(CASE, swarm={"timeout_s": 5})
    outcomes = pool.outcomes(disk_of_one_rank_full, case, tmp_path, timeout=40)
    assert (outcomes[3].kind, "cannot write" in outcomes[3].text) == ("CheckpointError", True), outcomes[3]
    assert {outcome.kind for outcome in outcomes[:3]} <= {"CheckpointError", "PeerError"}, outcomes
    assert not (tmp_path / "latest").exists()
