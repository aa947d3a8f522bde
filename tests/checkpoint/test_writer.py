"""What is removed when only the newest checkpoints are kept; and bytes that are written later."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
import torch

from ds_pso.checkpoint.writer import Copies, prune


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name / "swarm").mkdir(parents=True)
        (folder / name / "swarm/rank_00000.json").write_text("{}")
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("keep", "newest", "expected"),
    [
        (1, 40, [40]),
        (2, 40, [30, 40]),
        (9, 40, [10, 20, 30, 40]),
        (2, 30, [20, 30]),  # went back to 20 and on from there: 40 is of the run before
        (3, 100_000_000, [30, 40, 100_000_000]),  # more digits than the name has room for
    ],
)
def test_the_last_ones_stay(tmp_path: Path, keep: int, newest: int, expected: list[int]) -> None:
    made(tmp_path, *(f"step_{step:08d}" for step in {10, 20, 30, 40, newest}))
    prune(tmp_path / f"step_{newest:08d}", keep)
    assert sorted(int(name[5:]) for name in left(tmp_path)) == expected


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    others = ["step_1", "step_00000001_mine", "steps", "model", "checkpoint-1", "particle_0", "step_00000002"]
    made(tmp_path, "step_00000010", "step_00000020", *others[:-1])
    (tmp_path / others[-1]).mkdir()  # no swarm in it
    (tmp_path / "latest").write_text("step_00000020")
    (tmp_path / "step_00000003").symlink_to(tmp_path / "model")
    for name in (".step_00000015.tmp", ".step_00000010.old"):  # what killed jobs leave
        (tmp_path / name).mkdir()
    prune(tmp_path / "step_00000020", 1)
    assert left(tmp_path) == sorted(["latest", "step_00000003", "step_00000020", *others])


def test_what_is_removed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, "step_00000010", "step_00000020")
    with caplog.at_level(logging.DEBUG, "ds_pso.checkpoint"):
        prune(tmp_path / "step_00000020", 1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("ds_pso.checkpoint.writer", "DEBUG")
    assert record.getMessage().endswith("step_00000010.old: removed; the newest 1 checkpoints stay")


def test_what_cannot_be_removed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "step_00000010", "step_00000020")

    def denied(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "replace", denied)
    with pytest.warns(UserWarning, match=r"step_00000010: an old checkpoint cannot be removed \(Permission denied\)"):
        prune(tmp_path / "step_00000020", 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_do_not_follow_the_tensors(tmp_path: Path, zipped: bool) -> None:
    flat = torch.arange(1e6)
    content = {"weight": flat[:10], "tied": flat[:10], "state": [flat[10:20].view(2, 5), {"step": torch.tensor(3.0)}]}
    expected = io.BytesIO()
    torch.save(content, expected, _use_new_zipfile_serialization=zipped)
    copies = Copies()
    copies.add(content, tmp_path / "file", zipped)
    copies.add({}, tmp_path / "other", zipped)
    flat.zero_()
    assert torch.serialization.get_crc32_options()
    assert copies.write() == [tmp_path / "file", tmp_path / "other"]
    assert torch.load(tmp_path / "other") == {}
    found, truth = torch.load(tmp_path / "file"), torch.load(io.BytesIO(expected.getvalue()))
    assert torch.equal(found["weight"], truth["weight"])
    assert torch.equal(found["state"][0], truth["state"][0])
    assert found["weight"].data_ptr() == found["tied"].data_ptr(), "tied tensors are no longer one"
    assert (tmp_path / "file").stat().st_size == len(expected.getvalue())
