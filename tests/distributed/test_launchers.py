"""The same script under all three launchers: same particles, clean exit, nothing left behind.

The processes are fresh ones, so resuming is tested here across real process borders, too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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


def launch(launcher: str, *arguments: str) -> str:
    """Standard error and output together, after checking the exit code."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command(launcher), str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean,
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
