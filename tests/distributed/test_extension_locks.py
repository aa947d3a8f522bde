"""A lock that a killed compilation has left is named before torch waits for it."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest

import ds_pso
from ds_pso.distributed.extension_locks import warn_of_old_locks


def said(environment: dict[str, str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_old_locks(environment)
    return [str(w.message) for w in caught]


def lock_of(folder: Path, age_s: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - age_s,) * 2)
    return folder / "lock"


def test_an_old_lock_is_named(tmp_path):
    lock = lock_of(tmp_path / "deepspeed_shm_comm", 3000)
    (message,) = said({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert message.startswith(
        f"{lock}: a process that was compiling deepspeed_shm_comm for DeepSpeed was killed 50 min"
    )
    assert "delete this file" in message


def test_who_is_compiling_is_left_alone(tmp_path):
    lock_of(tmp_path / "cpu_adam", 100)
    (tmp_path / "done").mkdir()
    assert said({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == []
    assert said({"TORCH_EXTENSIONS_DIR": str(tmp_path / "nowhere")}) == []


def test_the_usual_place_has_a_folder_for_each_python(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    lock_of(tmp_path / ".cache/torch_extensions/py311_cpu/cpu_adam", 3000)
    assert len(said({})) == 1


def test_a_swarm_says_it(tmp_path, monkeypatch):
    lock_of(tmp_path / "cpu_adam", 3000)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="delete this file"):
        ds_pso.init({"swarm": {"particles": 1}}).close()
