"""The same script under all three launchers: same particles, clean exit, nothing left behind.

The processes are fresh ones, so resuming is tested here across real process borders, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pool import free_port

SCRIPT = Path(__file__).with_name("launcher_script.py")
BIN = Path(sys.executable).parent
COMPLAINTS = re.compile(
    r"ds_pso.*(warning|error)|destroy_process_group|leaked|Traceback|Exception|Broken pipe|recvValue failed", re.I
)


def command(launcher: str) -> list[str]:
    port = str(free_port())
    return {
        "torchrun": [f"{BIN}/torchrun", "--nproc_per_node", "4", "--master_port", port],
        "deepspeed": [f"{BIN}/deepspeed", "--num_gpus", "4", "--master_port", port],
        "accelerate": [
            f"{BIN}/accelerate",
            *("launch", "--use_deepspeed", "--num_processes", "4", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port),
        ],
    }[launcher]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return clean


def launch(launcher: str, *arguments: str) -> str:
    """Standard error and output together, after checking the exit code."""
    done = subprocess.run(
        [*command(launcher), str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def check(launcher: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    output = launch(launcher, "--folder", str(folder), *arguments)
    bad = [line for line in output.splitlines() if COMPLAINTS.search(line)]
    assert not bad, bad
    everyone = json.loads((folder / ("resumed.json" if "--resume" in arguments else "first.json")).read_text())
    assert [rank["particle"] for rank in everyone] == [0, 0, 1, 1]
    assert [rank["world"] for rank in everyone] == [["0", "2", "0"], ["1", "2", "1"], ["0", "2", "2"], ["1", "2", "3"]]
    assert not [rank["pid"] for rank in everyone if psutil.pid_exists(rank["pid"])], "a process was left behind"
    return [rank["weights"] for rank in everyone]


@pytest.mark.timeout(500)
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_the_same_script_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    first = check(launcher, tmp_path)
    if launcher == "torchrun":  # resuming in fresh processes: once is enough
        assert check(launcher, tmp_path, "--resume") == first


def pids_in(folder: Path) -> list[int]:
    """Of the four ranks, when training has begun and a checkpoint is complete."""
    deadline = time.monotonic() + 200
    while len(list(folder.glob("pid_*"))) < 4 or not (folder / "latest").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    return [int(path.read_text()) for path in folder.glob("pid_*")]


def hear_signals() -> None:
    """Undo what a shell sets for jobs in the background: what is ignored at its start, a program leaves so."""
    for sign in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, signal.SIG_DFL)


# torchrun says 1 whatever its ranks say. deepspeed passes their code on, but no signal: its group must get it, as from
# a terminal, and then it ends at once.
@pytest.mark.timeout(500)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "to", "sign", "code"),
    [
        ("torchrun", "launcher", signal.SIGTERM, 1),
        ("torchrun", "launcher", signal.SIGINT, 1),
        ("torchrun", "launcher", signal.SIGHUP, 1),
        ("torchrun", "ranks", signal.SIGTERM, 1),
        ("deepspeed", "group", signal.SIGTERM, -15),
        ("deepspeed", "group", signal.SIGINT, -2),
        ("deepspeed", "group", signal.SIGHUP, -1),
        ("deepspeed", "ranks", signal.SIGTERM, 75),
    ],
)
def test_a_signal_saves_and_the_next_run_goes_on(launcher: str, to: str, sign: int, code: int, tmp_path: Path) -> None:
    folder, truth = tmp_path / "told", tmp_path / "undisturbed"
    folder.mkdir()
    truth.mkdir()
    arguments = ["--folder", str(folder), "--until_asked", "--steps", "100000"]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(
            [*command(launcher), str(SCRIPT), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            preexec_fn=hear_signals,
        )
        try:
            pids = pids_in(folder)
            for pid in {"launcher": [started.pid], "group": [-started.pid], "ranks": pids}[to]:
                os.kill(pid, sign)
            assert started.wait(60) == code, (tmp_path / "log").read_text()[-5000:]
            _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
            assert not left
        finally:
            started.kill()
            for path in folder.glob("pid_*"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(int(path.read_text()))
                    if str(SCRIPT) in process.cmdline():
                        process.kill()
    stopped = int((folder / "latest").read_text().removeprefix("step_"))
    assert stopped > 3, "only what was saved before is there"
    steps = ["--steps", str(stopped + 3)]
    assert check(launcher, folder, "--resume", *steps) == check(launcher, truth, *steps)
