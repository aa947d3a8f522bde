"""A process that is started again when it ends: it prints through this one, and is ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from ds_pso.elastic import launch_env


@dataclass
class Child:
    """A command to start, and what has become of it so far.

    Args:
        command: its words; asked each time, for a port may be taken the second time.
        quiet: whether what it prints goes to its log alone.
        log_dir: gets what it prints.
    """

    name: str
    command: Callable[[], list[str]]
    env: Mapping[str, str]
    quiet: bool = False
    log_dir: Path | None = None
    process: subprocess.Popen[str] | None = None
    attempt: int = 0
    failures: int = 0  # since it last ran for long
    started: float = 0.0
    again_at: float | None = 0.0  # None: never
    code: int | None = None  # of the last exit

    @property
    def is_over(self) -> bool:
        return self.process is None and self.again_at is None

    def start(self) -> None:
        # A session of its own: Ctrl-C is for this process, which then asks the particles to end.
        self.process = subprocess.Popen(
            self.command(),
            env={**self.env, launch_env.ATTEMPT: str(self.attempt)},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.started, self.again_at = time.monotonic(), None
        assert self.process.stdout is not None
        threading.Thread(target=self._copy, args=(self.process.stdout, self._open_log()), daemon=True).start()

    def kill(self) -> None:
        """All that is left of its process group, stopped processes too."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The ranks: children of DeepSpeed's launch.py, which itself would kill them half a minute after a signal."""
        if self.process is None:
            return []
        try:
            return list(psutil.Process(self.process.pid).children())
        except psutil.Error:
            return []

    def _open_log(self) -> IO[str] | None:
        if self.log_dir is not None:
            with contextlib.suppress(OSError):
                self.log_dir.mkdir(parents=True, exist_ok=True)
                return (self.log_dir / f"{self.name.replace(' ', '_')}.log").open("a", encoding="utf-8")
        return None

    def _copy(self, source: IO[str], log: IO[str] | None) -> None:
        """Lines to this terminal, marked with its name, and to its log."""
        with source:
            for line in source:
                with contextlib.suppress(OSError):  # a full disk or a closed terminal must not end the particle
                    if log is not None:
                        log.write(line)
                        log.flush()
                if not self.quiet:
                    echo(f"[{self.name}] {line}", end="")
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()


def echo(text: str, end: str = "\n") -> None:
    """To a terminal that may be gone."""
    with contextlib.suppress(OSError):
        print(text, end=end, flush=True)


def reason(code: int) -> str:
    """Exit code or signal as text."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
