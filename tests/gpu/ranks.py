"""The processes of a check. They import while the check before still runs: that takes as long as many a check does."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpu.table import Check

ROOT = Path(__file__).parents[2]
IMPORT_LIMIT_S = 180.0
_LOOK_S = 0.02
_GRACE_S = 5.0  # for the other ranks, once one has failed
_STACKS_S = 1.0
_WAITING = "still waiting"

State = Literal["ok", "failed", "not tried"]


@dataclass(frozen=True)
class Outcome:
    """How a check ended.

    Attributes:
        found: what it found, why it was not tried, or the error.
        seconds: from the word to go.
        detail: traceback, stacks of those who were late, and the end of their output.
    """

    state: State
    found: str
    seconds: float = 0.0
    detail: str = ""


class Ranks:
    """The processes of one check, which wait for ``run`` or ``end``.

    Args:
        folder: an empty one, for logs, results and what the check writes.
        device: ``cuda`` or ``cpu``.
        paths: folders with packages, before all others.
    """

    def __init__(self, check: Check, folder: Path, device: str, paths: Sequence[Path] = ()) -> None:
        self._check, self._folder = check, folder
        folder.mkdir(parents=True)
        port = _free_port()
        self._processes = [self._start(rank, port, device, paths) for rank in range(check.ranks)]

    def _start(self, rank: int, port: int, device: str, paths: Sequence[Path]) -> subprocess.Popen[bytes]:
        environment = os.environ | _environment(self._check, rank, port, device, paths)
        command = [sys.executable, "-m", "gpu.rank", self._check.body, str(self._folder), str(rank)]
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, limit_s: float, deadline: float = math.inf) -> Outcome:
        """Let them begin, and wait for all; whoever is late is killed, and its stack is in the outcome.

        Args:
            limit_s: seconds after which the check has failed.
            deadline: ``time.monotonic()`` from which on there is no time for it.
        """
        try:
            begin = time.monotonic()
            if not self._wait_until(self._ready, min(IMPORT_LIMIT_S, deadline - begin)):
                return self._late("its processes were not ready", begin, deadline)
            begin = time.monotonic()
            for process in self._processes:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended already
                    process.stdin.write(b"go\n")
                    process.stdin.flush()
            if not self._wait_until(self._over, min(limit_s, deadline - begin)):
                return self._late(f"not done after {limit_s:.0f} s", begin, deadline)
            if self._failed() and not self._wait_until(lambda rank: not self._runs(rank), _GRACE_S):
                self._dump_stacks()
            return self._judge(time.monotonic() - begin)
        finally:
            self.end()

    def _late(self, what: str, begin: float, deadline: float) -> Outcome:
        now = time.monotonic()
        if now >= deadline:
            return Outcome("not tried", f"not to its end: no time was left after {now - begin:.0f} s", now - begin)
        self._dump_stacks()
        return Outcome("failed", what, now - begin, self._details())

    def end(self) -> None:
        """Kill what is left of them, and all that they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

    def _ready(self, rank: int) -> bool:
        return (self._folder / f"rank_{rank}.ready").exists() or not self._runs(rank)

    def _over(self, rank: int) -> bool:
        """True if this rank is done, or another one has failed, so that it may wait for ever."""
        return not self._runs(rank) or self._failed()

    def _failed(self) -> bool:
        return any(not self._runs(rank) and self._result(rank).state == "failed" for rank in self._numbers)

    def _runs(self, rank: int) -> bool:
        return self._processes[rank].poll() is None

    @property
    def _numbers(self) -> Iterable[int]:
        return range(len(self._processes))

    def _wait_until(self, holds: Callable[[int], bool], limit_s: float) -> bool:
        """Wait until it holds of every rank; false if it takes longer than that."""
        deadline = time.monotonic() + limit_s
        while not all(holds(rank) for rank in self._numbers):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        return True

    def _dump_stacks(self) -> None:
        for rank in self._numbers:
            if self._runs(rank):
                self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(_STACKS_S)

    def _log(self, rank: int) -> Path:
        return self._folder / f"log_{rank}.txt"

    def _result(self, rank: int) -> Outcome:
        path = self._folder / f"rank_{rank}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            return Outcome(found["state"], found["found"], detail=found["trace"])
        code = self._processes[rank].poll()
        return Outcome("failed", _WAITING if code is None else f"the process ended with exit code {code}")

    def _judge(self, seconds: float) -> Outcome:
        """Sum the ranks up: an error of one counts before others' complaint that it was lost."""
        results = [self._result(rank) for rank in self._numbers]
        bad = [result for result in results if result.state == "failed"]
        if bad:
            first = min(bad, key=lambda result: "PeerError" in result.found or result.found == _WAITING)
            return Outcome("failed", first.found, seconds, self._details())
        refused = next((result for result in results if result.state == "not tried"), None)
        return Outcome("ok" if refused is None else "not tried", (refused or results[0]).found, seconds)

    def _details(self) -> str:
        return "\n".join(self._detail(rank) for rank in self._numbers)

    def _detail(self, rank: int) -> str:
        log = self._log(rank).read_text(encoding="utf-8", errors="replace")
        return f"-- rank {rank}: {self._result(rank).found}\n{self._result(rank).detail}\n{log[-4000:]}"


def _environment(check: Check, rank: int, port: int, device: str, paths: Sequence[Path]) -> dict[str, str]:
    values: dict[str, object] = {
        "RANK": rank,
        "WORLD_SIZE": check.ranks,
        "LOCAL_RANK": rank if check.one_gpu_each or device == "cpu" else 0,
        "LOCAL_WORLD_SIZE": check.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "LAUNCHED_RANK": rank,
        "LAUNCHED_WORLD_SIZE": check.ranks,
        "OMP_NUM_THREADS": 1,
        "PYTHONPATH": python_path(paths),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it products on several streams need not be the same bits
        "GPU_CHECK_DEVICE": device,
    }
    if device == "cpu":
        values |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {name: str(value) for name, value in values.items()}


def python_path(paths: Sequence[Path]) -> str:
    """Return where a process of a check finds packages: in ``paths``, in this repository, and as before."""
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests", ROOT / "recipes", *before)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
