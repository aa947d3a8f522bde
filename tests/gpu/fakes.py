"""Checks that end in every way there is, at once and without torch, for the tests of what runs them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gpu.table import NotTried

RANK = int(os.environ["LAUNCHED_RANK"])


def holds(folder: Path) -> str:
    return f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {os.environ['LOCAL_RANK']} here"


def fails_on_one_rank(folder: Path) -> str:
    if RANK == 0:
        time.sleep(600)  # as whoever waits for a rank that is gone
    raise ValueError("the second rank\nhas found it")


def hangs(folder: Path) -> str:
    time.sleep(600)
    return "woke up"


def dies(folder: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def cannot(folder: Path) -> str:
    raise NotTried("there is no such device")


def starts_others(folder: Path) -> str:
    if os.fork() == 0:
        (folder / f"child_{RANK}").write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)
    return "woke up"
