"""``python -m benchmarks.soak``: half an hour of an elastic swarm with a random fault every 20 seconds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from benchmarks.soak.worker import MADNESS
from benchmarks.table import Table, machine, versions
from ds_pso.files import write_atomically

FOLDER = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "worker.py"
HEARTBEAT_S, TIMEOUT_S = 5.0, 60.0
INTERVAL = 8
FAULTS = {
    "rank killed": 4,
    "job killed": 3,
    "stopped for 2 s": 2,
    "stopped for 30 s": 3,
    "lighthouse killed": 2,
    "all particles killed": 1,
    **dict.fromkeys(MADNESS, 2),
}
_BACK_WITHIN_S = 240.0


@dataclass(frozen=True)
class Fault:
    """What was done, and to whom."""

    number: int
    at_s: float
    what: str
    particle: int  # -1: none or all


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        left_out: sync points that the others had without it.
        back_s: until a sync point with all particles, alive; NaN: not before the next fault or the end.
    """

    left_out: int
    back_s: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=5600, help="of each particle; with the default pace about half an hour")
    add("--pace", type=float, default=0.25, help="seconds that a particle sleeps after each step")
    add("--every", type=float, default=20.0, help="seconds between faults")
    add("--particles", type=int, default=4)
    add("--undisturbed", type=int, default=3, help="runs without faults, to compare with")
    add("--seed", type=int, default=0)
    add("--name", default="soak", help="of the files in results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        calm = [_calm(folder / f"calm_{i}", arguments, i) for i in range(arguments.undisturbed)]
        report = _soak(folder / "soak", arguments)
    _write(arguments, report, calm)


def _config(folder: Path, arguments: argparse.Namespace) -> Path:
    folder.mkdir()
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupHoldDecayLR",
            "params": {"total_num_steps": arguments.steps, "warmup_max_lr": 0.002, "warmup_num_steps": 20},
        },
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "swarm": {
            "particles": "node",
            "sync_mode": "local_sgd",
            "sync_interval": INTERVAL,
            "transport": "elastic",
            "timeout_s": TIMEOUT_S,
            "elastic": {"heartbeat_s": HEARTBEAT_S},
        },
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def _launch(folder: Path, arguments: argparse.Namespace, seed: int, pace: float) -> subprocess.Popen[bytes]:
    config = _config(folder, arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "ds_pso.cli", "launch", "--particles", str(arguments.particles)]
    words += ["--port", str(port), "--max-restarts", "1000", "--log-dir", str(folder / "logs")]
    words += [str(WORKER), "--deepspeed_config", str(config), "--folder", str(folder)]
    words += ["--steps", str(arguments.steps), "--pace", str(pace), "--seed", str(seed)]
    with (folder / "launch.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)


def _calm(folder: Path, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """An undisturbed run; pauses between steps change nothing that it learns."""
    process = _launch(folder, arguments, seed, 0.0)
    if process.wait() != 0:
        raise SystemExit((folder / "launch.log").read_text()[-4000:])
    end = _ends(folder)
    print(f"undisturbed, seed {seed}: held-out loss {mean(e['loss'] for e in end):.4f}", flush=True)
    return {"loss": mean(e["loss"] for e in end), "accuracy": mean(e["accuracy"] for e in end)}


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("particle_*/soak.jsonl")):
        particle = int(path.parent.name.removeprefix("particle_"))
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield {"particle": particle, **json.loads(line)}


def _ends(folder: Path) -> list[dict[str, Any]]:
    return [record for record in _records(folder) if record["event"] == "end"]


def _soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    process = _launch(folder, arguments, 0, arguments.pace)
    begin, random_fault = time.time(), random.Random(arguments.seed)
    inject = Injector(folder, process.pid, arguments.particles)
    faults: list[tuple[Fault, float]] = []
    try:
        while not inject.everybody_trains() and process.poll() is None:
            time.sleep(1)
        while process.poll() is None:
            time.sleep(arguments.every)
            # What happens in the last steps cannot be mended any more: nobody meets after them.
            if process.poll() is not None or inject.step() > 0.95 * arguments.steps:
                continue
            what = random_fault.choices(list(FAULTS), list(FAULTS.values()))[0]
            now, particle = time.time(), inject.do(what, random_fault)
            if particle is not None:
                faults.append((Fault(len(faults), round(now - begin, 1), what, particle), now))
                print(f"{now - begin:7.1f} s, step {inject.step()}: {what}, particle {particle}", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(90)
    took = time.time() - begin
    records = list(_records(folder))
    syncs = sorted((r for r in records if r["event"] == "sync"), key=lambda r: r["time"])
    starts = sum(r["event"] == "start" for r in records)
    return {
        "code": process.returncode,
        "log": (folder / "launch.log").read_text()[-3000:],
        "seconds": took,
        "faults": [(fault, _outcome(fault, at, syncs, arguments.particles)) for fault, at in faults],
        "starts": starts,
        "ends": _ends(folder),
        "processes": inject.left_behind(),
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".step_")),
        "memory": _memory(records, begin, took),
        "supervisor": inject.supervisor_rss,
    }


class Injector:
    """Finds the processes of a swarm and does things to them."""

    def __init__(self, folder: Path, supervisor: int, particles: int) -> None:
        self._folder = folder
        self._supervisor = psutil.Process(supervisor)
        self._particles = particles
        self.supervisor_rss: list[int] = []

    def _workers(self) -> dict[int, psutil.Process]:
        """By particle, those that train."""
        found = {}
        for record in _records(self._folder):
            found[record["particle"]] = record["pid"]
        alive = {}
        for particle, pid in found.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if str(WORKER) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    alive[particle] = process
        return alive

    def everybody_trains(self) -> bool:
        return len(self._workers()) == self._particles

    def step(self) -> int:
        return max((record["step"] for record in _records(self._folder)), default=0)

    def do(self, what: str, chance: random.Random) -> int | None:
        """Returns the particle; -1 if it is about none or all, None if nobody is left to do it to."""
        with contextlib.suppress(psutil.Error):
            self.supervisor_rss.append(self._supervisor.memory_info().rss)
        workers = self._workers()
        if what == "lighthouse killed":
            for child in self._supervisor.children():
                if "torchft_lighthouse" in " ".join(child.cmdline()):
                    child.kill()
                    return -1
            return None
        if what == "all particles killed":
            for worker in workers.values():
                worker.kill()
            return -1
        running = {p: w for p, w in workers.items() if w.status() != psutil.STATUS_STOPPED}
        if len(running) < 2:
            return None
        particle = chance.choice(sorted(running))
        worker = running[particle]
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


def _outcome(fault: Fault, at: float, syncs: list[dict[str, Any]], particles: int) -> Outcome:
    after = [sync for sync in syncs if sync["time"] > at + 0.5]
    back = next((s for s in after if len(s["present"]) == particles and all(s["alive"]) and not s["healed"]), None)
    until = back["time"] if back else float("inf")
    without = {s["step"] for s in after if s["time"] < until and fault.particle not in s["present"]}
    late = back is None or until - at > _BACK_WITHIN_S
    return Outcome(len(without) if fault.particle >= 0 else 0, float("nan") if late else round(until - at, 1))


def _memory(records: list[dict[str, Any]], begin: float, took: float) -> tuple[float, float]:
    """Median resident memory of a particle's process in the first and in the last third of the run, in MB.

    Of those who have run for a minute: what a process takes at its start is not growth.
    """
    born: dict[int, float] = {}
    for record in records:
        born.setdefault(record["pid"], record["time"])
    grown = [r for r in records if r["event"] == "sync" and r["time"] - born[r["pid"]] > 60]
    first = [r["rss"] for r in grown if r["time"] - begin < took / 3]
    last = [r["rss"] for r in grown if r["time"] - begin > 2 * took / 3]
    return tuple(median(part) / 1e6 if part else float("nan") for part in (first, last))  # type: ignore[return-value]


def _write(arguments: argparse.Namespace, report: dict[str, Any], calm: list[dict[str, float]]) -> None:
    FOLDER.mkdir(exist_ok=True)
    csv = FOLDER / f"{arguments.name}.csv"
    csv.unlink(missing_ok=True)
    table = Table(csv, Fault, Outcome)
    for fault, outcome in report["faults"]:
        table.add(fault, outcome)
    hours = report["seconds"] / 3600
    lines = [
        "# Soak: random faults in an elastic swarm",
        "",
        f"`python -m benchmarks.soak --steps {arguments.steps} --pace {arguments.pace:g} --every {arguments.every:g} "
        f"--particles {arguments.particles} --seed {arguments.seed}`, {machine()}, {versions()}.",
        "",
        f"{arguments.particles} particles of one rank, ZeRO 2, averaging every {INTERVAL} steps, heartbeat "
        f"{HEARTBEAT_S:g} s; {report['seconds'] / 60:.0f} minutes.",
        "",
        "| | |",
        "| --- | --- |",
        f"| the launcher's exit code | {report['code']} |",
        f"| particles that came to the end | {len(report['ends'])} of {arguments.particles} |",
        f"| faults | {len(report['faults'])}, which is {len(report['faults']) / hours:.0f} per hour |",
        f"| starts of a particle | {report['starts']}, the first {arguments.particles} included |",
        f"| held-out loss | {_each(report['ends'], 'loss')} |",
        f"| undisturbed, {len(calm)} seeds | {_each(calm, 'loss')} |",
        f"| held-out accuracy | {_each(report['ends'], 'accuracy')} |",
        f"| undisturbed | {_each(calm, 'accuracy')} |",
        f"| processes left behind | {len(report['processes'])} |",
        f"| unfinished checkpoints left behind | {len(report['files'])} |",
        f"| memory of a particle, first and last third | {report['memory'][0]:.0f} MB, {report['memory'][1]:.0f} MB |",
        f"| memory of the launcher, first and last | {report['supervisor'][0] / 1e6:.0f} MB, "
        f"{report['supervisor'][-1] / 1e6:.0f} MB |",
        "",
        "| fault | times | sync points without it | seconds until all met again, alive: median (worst) |",
        "| --- | --- | --- | --- |",
    ]
    for what in FAULTS:
        found = [outcome for fault, outcome in report["faults"] if fault.what == what]
        if found:
            back = [o.back_s for o in found if o.back_s == o.back_s]
            times = f"{median(back):.0f} ({max(back):.0f})" if back else "not before the end"
            lines.append(f"| {what} | {len(found)} | {median(o.left_out for o in found):g} | {times} |")
    lines += ["", "The next fault often comes before the last one is mended, so these times overlap.", ""]
    write_atomically(FOLDER / f"{arguments.name}.md", "\n".join(lines))
    print("\n".join(lines))
    if report["code"] != 0:
        print(report["log"], file=sys.stderr)
        raise SystemExit(1)


def _each(runs: list[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{run[key]:.4f}" for run in runs)


if __name__ == "__main__":
    main()
