"""``ds-pso launch`` with DeepSpeed's own launcher, from the first death of a rank to the end of the training."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pool import free_port

from benchmarks.soak import run as soak
from benchmarks.soak.faults import Injector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def wait_until(what: Callable[[], bool], within_s: float = 150.0) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


def starts(folder: Path, particle: int) -> list[int]:
    """Steps at which a process of this particle began."""
    return [r["step"] for r in soak.records(folder) if r["event"] == "start" and r["particle"] == particle]


def launch(folder: Path, config: Path, *more: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "ds_pso.cli.main", "launch", "--particles", "2", "--port", str(free_port())]
    words += [str(soak.WORKER), "--deepspeed_config", str(config), "--folder", str(folder), "--steps", "1200"]
    with (folder / "launch.log").open("ab") as log:
        return subprocess.Popen([*words, "--save_every", "20", *more], stdout=log, stderr=subprocess.STDOUT)


def test_ranks_die_everybody_dies_and_the_job_is_asked_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = soak.write_config(folder, 1200)
    process = launch(folder, config, "--pace", "0.1")
    try:
        inject, chance = Injector(folder, process.pid, 2), random.Random(0)
        wait_until(inject.everybody_trains)
        wait_until(lambda: inject.step() >= 24)
        killed = inject.do("rank killed", chance)
        assert killed is not None
        wait_until(lambda: len(starts(folder, killed)) == 2)
        assert starts(folder, killed)[1] >= 24, "it begins where the other is"

        wait_until(lambda: inject.everybody_trains() and len(list(folder.glob("checkpoints/particle_*/latest"))) == 2)
        before = inject.step()
        inject.do("all killed", chance)
        wait_until(lambda: [len(starts(folder, p)) for p in (killed, 1 - killed)] == [3, 2])
        # Every 20 steps; that of the one that had just come back may be older.
        assert max(starts(folder, p)[-1] for p in range(2)) >= before - 40

        wait_until(lambda: inject.step() > before + 16)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 75
        assert inject.left_behind() == []
    finally:
        process.kill()

    process = launch(folder, config, "--resume")
    try:
        assert process.wait(200) == 0
    finally:
        process.kill()
    assert starts(folder, 0)[-1] > before
    ends = soak.ends(folder)
    assert len(ends) == 2
    assert ends[0]["loss"] == ends[1]["loss"]
    assert inject.left_behind() == []
