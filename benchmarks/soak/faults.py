"""The faults of the soak, and who does them to which process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks.soak.run import WORKER, records
from benchmarks.soak.worker import AT_ITSELF
from ds_pso.checkpoint.format import steps_in

# How often each comes among random ones.
FAULTS = {
    "rank killed": 4,
    "job killed": 3,
    "all but one killed": 1,
    "all killed": 1,
    "all killed, newest checkpoints damaged": 1,
    "lighthouse killed": 2,
    "stopped for 2 s": 2,
    "stopped for 30 s": 3,
    **dict.fromkeys(AT_ITSELF, 2),
}
NOBODY = -1  # in particular


class Injector:
    """Finds the processes of a swarm and does things to them.

    Args:
        folder: of the run.
        supervisor: the launcher's process.
    """

    def __init__(self, folder: Path, supervisor: int, particles: int) -> None:
        self._folder = folder
        self._supervisor = psutil.Process(supervisor)
        self._particles = particles
        self.supervisor_rss: list[int] = []

    def everybody_trains(self) -> bool:
        return len(self._workers()) == self._particles

    def step(self) -> int:
        return max((record["step"] for record in records(self._folder)), default=0)

    def do(self, what: str, chance: random.Random) -> int | None:
        """Returns the particle, or ``NOBODY``; None if nobody is left to do it to."""
        with contextlib.suppress(psutil.Error):
            self.supervisor_rss.append(self._supervisor.memory_info().rss)
        if what == "lighthouse killed":
            return self._kill_lighthouse()
        workers = self._workers()
        if what.startswith("all killed") and workers:
            for worker in workers.values():
                worker.kill()
            if what.endswith("damaged"):
                self._damage_checkpoints()
            return NOBODY
        running = sorted(p for p, w in workers.items() if w.status() != psutil.STATUS_STOPPED)
        if len(running) < 2:
            return None
        particle = chance.choice(running)
        if what == "all but one killed":
            for other in workers.keys() - {particle}:
                workers[other].kill()
            return NOBODY
        self._do_to(particle, workers[particle], what)
        return particle

    def left_behind(self) -> list[str]:
        """Command lines of processes that should have ended."""
        time.sleep(2)
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self._folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(line)
        return found

    def _workers(self) -> dict[int, psutil.Process]:
        """By particle, those that train."""
        found = {record["particle"]: record["pid"] for record in records(self._folder)}
        alive = {}
        for particle, pid in found.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if str(WORKER) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    alive[particle] = process
        return alive

    def _do_to(self, particle: int, worker: psutil.Process, what: str) -> None:
        if what == "rank killed":
            worker.kill()
        elif what == "job killed":
            os.killpg(os.getpgid(worker.pid), signal.SIGKILL)
        elif what.startswith("stopped"):
            worker.suspend()
            seconds = float(what.split()[2])
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {worker.pid}"])
        else:
            (self._folder / f"fault_{particle}").write_text(what)

    def _kill_lighthouse(self) -> int | None:
        for child in self._supervisor.children():
            if "torchft_lighthouse" in " ".join(child.cmdline()):
                child.kill()
                return NOBODY
        return None

    def _damage_checkpoints(self) -> None:
        """Change a bit in the middle of the largest file of every particle's newest checkpoint."""
        for folder in self._folder.glob("checkpoints/particle_*"):
            for name in steps_in(folder)[:1]:
                largest = max((f for f in (folder / name).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
                with largest.open("r+b") as file:
                    file.seek(largest.stat().st_size // 2)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 1]))
