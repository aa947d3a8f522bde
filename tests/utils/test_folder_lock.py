"""One process at a time in a folder: who holds it is named, and no end of a process leaves it locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_pso.errors import ConfigError
from ds_pso.utils.folder_lock import NAME, FolderLock, lock_folder

HOLD = """
import sys, time, pathlib
from ds_pso.utils.folder_lock import lock_folder
lock = lock_folder(pathlib.Path(sys.argv[1]), 0.0)
print("locked", flush=True)
time.sleep(100)
"""


@contextlib.contextmanager
def another_process(folder: Path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def is_free(folder: Path) -> bool:
    """Whether another process could lock it; asked with a file of its own, as that would."""
    if not (folder / NAME).exists():
        return True
    with (folder / NAME).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_is_named_until_it_ends(tmp_path, sign):
    with another_process(tmp_path) as process:
        with pytest.raises(ConfigError) as caught:
            lock_folder(tmp_path, 0.0)
        said = f"{tmp_path}: another run writes into this folder (process {process.pid} on "
        assert str(caught.value).startswith(said)
        assert "give another run_dir (train.py: --output_dir)" in str(caught.value)
        process.send_signal(sign)
        process.wait(20)
        lock_folder(tmp_path, 0.0).release()


def test_one_that_is_just_going_is_waited_for(tmp_path):
    with another_process(tmp_path) as process:
        process.kill()  # it may take a moment
        lock_folder(tmp_path, 20.0).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\0\xff", '{"pid": 1}'])
def test_what_a_crash_left_in_the_file_does_not_matter(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    lock = lock_folder(tmp_path)
    lock.release()
    with (tmp_path / NAME).open("w") as file:
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="a process that has just begun"):
            lock_folder(tmp_path, 0.0)


def test_nothing_is_left_behind(tmp_path):
    folder = tmp_path / "runs" / "new"
    lock = lock_folder(folder)
    assert not is_free(folder)
    lock.release()
    assert not folder.exists()
    lock = lock_folder(folder)
    (folder / "metrics.jsonl").touch()
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_process_may_lock_a_folder_several_times(tmp_path):
    first, again = lock_folder(tmp_path), lock_folder(tmp_path / ".")
    first.release()
    assert not is_free(tmp_path)
    again.release()
    assert is_free(tmp_path)


def test_what_nobody_refers_to_is_not_locked(tmp_path):
    lock_folder(tmp_path)
    gc.collect()
    assert is_free(tmp_path)


def test_the_name_stays_locked_when_what_was_there_is_renamed(tmp_path):
    folder, old = tmp_path / "run", tmp_path / "run.1"
    lock = lock_folder(folder)
    (folder / "metrics.jsonl").touch()
    folder.rename(old)
    lock.renamed(old)
    assert [path.name for path in old.iterdir()] == ["metrics.jsonl"]
    assert not is_free(folder)
    lock.release()
    assert is_free(folder)


def test_who_waited_for_a_folder_that_was_renamed_gets_the_new_one(tmp_path):
    """And does not believe to hold the name when it is the old folder that it has locked."""
    folder = tmp_path / "run"
    with another_process(folder) as process:
        waits = subprocess.Popen(
            [sys.executable, "-c", HOLD.replace("0.0", "30.0"), str(folder)], stdout=subprocess.PIPE, text=True
        )
        time.sleep(1.0)
        folder.rename(tmp_path / "run.1")
        process.kill()
        try:
            assert waits.stdout.readline() == "locked\n"
            assert not is_free(folder)
        finally:
            waits.kill()
            waits.wait()
            waits.stdout.close()


def wait_in_child(end) -> None:
    end.send(None)
    time.sleep(100)


def test_a_child_does_not_keep_it(tmp_path):
    """A worker of a loader may live longer than the rank that has started it."""
    lock = lock_folder(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=wait_in_child, args=(theirs,), daemon=True)
    child.start()
    ours.recv()
    os.close(lock.file)  # as the kernel does at the end of this process
    try:
        assert is_free(tmp_path)
    finally:
        child.kill()
        child.join()
        lock._let_go.detach()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_on_the_disk_training_goes_on(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = lock_folder(tmp_path)
    assert isinstance(lock, FolderLock)
    assert "cannot be locked" in caplog.text
    lock.release()


def test_another_error_is_one(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        lock_folder(tmp_path)
