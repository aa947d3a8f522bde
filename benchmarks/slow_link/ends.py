"""Runs one training process at each end of a link, a core each, and collects what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.slow_link.network import Link

_MARK = "result of an end: "


def tell(found: dict[str, Any]) -> None:
    """Called by an end: print what it found, so that ``run_ends`` returns it."""
    print(_MARK + json.dumps(found), flush=True)


def run_ends(link: Link, module: str, argument: str, limit_s: float) -> list[dict[str, Any]]:
    """Run ``python -m module argument`` at both ends at once, and return what each told.

    Raises:
        RuntimeError: an end failed, or told nothing within ``limit_s``; with the last lines of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{end}.log") for end in range(2)]  # a pipe that nobody reads would fill
        ends = [_start(link, end, [module, argument], log) for end, log in enumerate(logs)]
        deadline = time.monotonic() + limit_s
        try:
            while any(end.poll() is None for end in ends) and time.monotonic() < deadline:
                if any(end.poll() for end in ends):
                    break  # the other one would wait for who has failed
                time.sleep(0.2)
        finally:
            for end in ends:
                if end.poll() is None:
                    os.killpg(end.pid, signal.SIGKILL)
                    end.wait()
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    found = [json.loads(line.split(_MARK)[1]) for text in texts for line in text.splitlines() if _MARK in line]
    if len(found) < 2:
        raise RuntimeError("no result:\n" + "\n".join(text[-2000:] for text in texts))
    return found


def _start(link: Link, end: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(end),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": link.addresses[0],
        "MASTER_PORT": str(link.port),
        "ADDRESS": link.addresses[end],
        "GLOO_SOCKET_IFNAME": link.interface,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",  # DeepSpeed's Muon would compile for half a minute
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            link.command(end, sys.executable, "-m", *words),
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
