"""Keeps an elastic swarm running on this machine: the lighthouse, and a DeepSpeed job for each particle."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ds_pso.distributed.ending_signals import SIGNALS
from ds_pso.distributed.preemption import EXIT_PREEMPTED
from ds_pso.elastic import launch_env
from ds_pso.elastic.process import Child, echo, reason
from ds_pso.errors import ConfigError

_LOOK_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_STEADY_S = 600.0  # who has run for so long is started again without delay


@dataclass(frozen=True)
class Lighthouse:
    """Where it listens, and how long it waits; see ``ElasticConfig``."""

    host: str
    port: int
    join_s: float
    heartbeat_s: float

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.port}"

    def command(self) -> list[str]:
        beside = shutil.which("torchft_lighthouse", path=str(Path(sys.executable).parent))
        program = beside or shutil.which("torchft_lighthouse")
        if program is None:
            raise ConfigError("torchft_lighthouse is not installed; install ds_pso[elastic]")
        values = {
            "--bind": f"{_bracketed(self.host)}:{self.port}",
            "--min_replicas": 1,
            "--join_timeout_ms": int(1000 * self.join_s),
            "--quorum_tick_ms": 100,
            "--heartbeat_timeout_ms": int(1000 * self.heartbeat_s),
        }
        return [program, *(str(word) for pair in values.items() for word in pair)]


@dataclass
class Supervisor:
    """Runs until all particles have ended.

    Args:
        particles: places in the swarm that this machine fills.
        script: with its arguments.
        size: ranks per particle.
        devices: of each particle, the GPUs of its ranks; None on a machine without.
        lighthouse: to keep running here, if any.
        env: for every particle.
        max_restarts: of a particle, not counting those after it ran for ten minutes.
        grace_s: from asking a particle to end until it is killed.
        log_dir: gets what each particle prints.
    """

    particles: Sequence[int]
    script: Sequence[str]
    size: int
    devices: Mapping[int, Sequence[str]] | None
    lighthouse: Lighthouse | None
    env: Mapping[str, str]
    max_restarts: int = 10
    grace_s: float = 60.0
    log_dir: Path | None = None
    _children: dict[int, Child] = field(default_factory=dict)
    _stop_by: float | None = None  # when those who have not ended are killed
    _interrupted: bool = False  # by Ctrl-C
    _asked: set[int] = field(default_factory=set)  # pids of ranks that have been asked to end

    def run(self) -> int:
        """Returns 0 if the training came to its end; else the exit code of a particle that was stopped or failed."""
        keeper = None
        if self.lighthouse is not None:
            _check_free(self.lighthouse)
            keeper = Child("lighthouse", self.lighthouse.command, dict(os.environ), quiet=True, log_dir=self.log_dir)
            keeper.start()
        own = {**os.environ, **self.env, launch_env.LAUNCHER: uuid.uuid4().hex}
        for number in self.particles:
            env = {**own, launch_env.PARTICLE: str(number)}
            self._children[number] = Child(f"particle {number}", self._command_of(number), env, log_dir=self.log_dir)
        heeded = [sign for sign in SIGNALS if signal.getsignal(sign) is not signal.SIG_IGN]  # ignored: nohup
        before = {sign: signal.signal(sign, self._on_signal) for sign in heeded}
        try:
            while not all(child.is_over for child in self._children.values()):
                if keeper is not None:
                    self._look_after_lighthouse(keeper)
                for child in self._children.values():
                    self._look_after(child)
                if self._stop_by is not None:
                    self._ask_to_end()
                time.sleep(_LOOK_S)
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)
            for child in [*self._children.values(), *([keeper] if keeper else [])]:
                child.kill()
        return self._exit_code()

    def _command_of(self, number: int) -> Callable[[], list[str]]:
        def command() -> list[str]:
            # What `deepspeed` starts on each machine; that itself would exit with 0 when it is killed.
            devices = list(range(self.size)) if self.devices is None else [int(name) for name in self.devices[number]]
            world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
            words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
            words += ["--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
            return [*words, "--log_level=warning", *self.script]

        return command

    # -- one child ---------------------------------------------------------------------------

    def _look_after(self, child: Child) -> None:
        if child.process is None:
            if child.again_at is not None and time.monotonic() >= child.again_at:
                child.start()
            return
        code = child.process.poll()
        if code is None:
            return
        child.kill()  # what is left of its group
        child.process, child.code = None, code
        if code == 0:
            _say(f"{child.name} has finished")
        elif code == EXIT_PREEMPTED and self._stop_by is None:
            _say(f"{child.name} was asked to end, and has left the swarm")
        elif self._stop_by is not None:
            _say(f"{child.name} has ended with {reason(code)}")
        elif any(other.code == 0 for other in self._children.values()):
            _say(f"{child.name} ended with {reason(code)}; others have finished, so it is not started again")
        else:
            self._start_again(child, reason(code))

    def _start_again(self, child: Child, why: str) -> None:
        if time.monotonic() - child.started >= _STEADY_S:
            child.failures = 0
        child.failures += 1
        child.attempt += 1
        if child.failures > self.max_restarts:
            _say(
                f"{child.name} ended with {why}, the {child.failures}th time without running for "
                f"{_STEADY_S / 60:.0f} minutes; it is given up (--max-restarts {self.max_restarts})"
            )
            return
        pause = min(_FIRST_PAUSE_S * 2 ** (child.failures - 1), _LONGEST_PAUSE_S)
        child.again_at = time.monotonic() + pause
        _say(f"{child.name} ended with {why}; started again in {pause:.0f} s")

    def _look_after_lighthouse(self, keeper: Child) -> None:
        assert self.lighthouse is not None
        if keeper.process is not None and keeper.process.poll() is not None:
            _say(f"the lighthouse ended with {reason(keeper.process.returncode)}; started again")
            keeper.kill()
            keeper.attempt += 1
            time.sleep(min(_FIRST_PAUSE_S, 0.1 * keeper.attempt))
            keeper.start()

    # -- the end -----------------------------------------------------------------------------

    def _on_signal(self, sign: int, _: Any) -> None:
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self.grace_s
            _say(f"{signal.Signals(sign).name}: asking the particles to save and end; {self.grace_s:.0f} s for that")
        elif sign == signal.SIGINT and self._interrupted:
            self._stop_by = 0.0
            _say("Ctrl-C a second time: ending the particles at once")
        self._interrupted = self._interrupted or sign == signal.SIGINT

    def _ask_to_end(self) -> None:
        """Every rank once, also one that has just been started."""
        for child in self._children.values():
            child.again_at = None
            for worker in child.workers():
                if worker.pid not in self._asked:
                    self._asked.add(worker.pid)
                    with contextlib.suppress(psutil.Error):
                        worker.send_signal(signal.SIGTERM)
        if self._stop_by is not None and time.monotonic() > self._stop_by:
            for child in self._children.values():
                child.kill()

    def _exit_code(self) -> int:
        codes = [child.code for child in self._children.values()]
        if 0 in codes:
            return 0
        return next((code if code > 0 else 128 - code for code in codes if code), 1)


def _say(text: str) -> None:
    echo(f"ds-pso launch: {text}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_free(lighthouse: Lighthouse) -> None:
    try:
        family = socket.getaddrinfo(lighthouse.host, lighthouse.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((lighthouse.host, lighthouse.port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"--host {lighthouse.host} --port {lighthouse.port}: the lighthouse cannot listen there "
            f"({error.strerror or error}); give another port, or one of this machine's own addresses"
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
