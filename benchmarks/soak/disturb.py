"""A run with faults, and what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.soak.faults import Injector
from benchmarks.soak.run import INTERVAL, Run, ends, records

_BACK_WITHIN_S = 240.0
_LAST = 0.95  # of the steps: what happens later cannot be mended any more, as nobody meets then


@dataclass(frozen=True)
class Fault:
    """What was done, and to whom."""

    number: int
    at_s: float
    what: str
    particle: int  # or NOBODY


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        missed: sync points that the others had without it.
        back_s: until a sync point with all particles, alive; NaN: not before the next fault or the end.
        again: steps that a particle went back in the training, the most of all.
    """

    missed: int
    back_s: float
    again: int


@dataclass(frozen=True)
class Report:
    """Of a whole run.

    Attributes:
        code: the launcher's exit code.
        log: the end of what it printed.
        starts: how often a particle was started.
        ends: see :func:`benchmarks.soak.run.ends`.
        processes, files: left behind.
        memory: of a particle's process in the first and in the last third, bytes.
        supervisor: of the launcher, at the first and at the last fault, bytes.
    """

    code: int
    log: str
    seconds: float
    faults: list[tuple[Fault, Outcome]]
    starts: int
    ends: list[dict[str, Any]]
    processes: list[str]
    files: list[str]
    memory: tuple[float, float]
    supervisor: tuple[int, int]


def undisturbed(folder: Path, run: Run) -> dict[str, float]:
    """The held-out ``loss`` and ``accuracy`` of a run without faults."""
    process = run.launch(folder)
    if process.wait() != 0:
        raise SystemExit((folder / "launch.log").read_text()[-4000:])
    end = ends(folder)[0]
    print(f"undisturbed, seed {run.seed}: held-out loss {end['loss']:.4f}", flush=True)
    return {key: end[key] for key in ("loss", "accuracy")}


def disturb(folder: Path, run: Run, choose: Callable[[], str], every: float, seed: int, times: int) -> Report:
    """A run with at most ``times`` faults, one every ``every`` seconds; ``choose`` says which."""
    begin, chance = time.time(), random.Random(seed)
    process = run.launch(folder)
    inject = Injector(folder, process.pid, run.particles)
    faults: list[tuple[Fault, float]] = []
    try:
        while not inject.everybody_trains() and process.poll() is None:
            time.sleep(1)
        while process.poll() is None:
            time.sleep(every)
            if process.poll() is not None or inject.step() > _LAST * run.steps or len(faults) == times:
                continue
            what = choose()
            now, particle = time.time(), inject.do(what, chance)
            if particle is not None:
                faults.append((Fault(len(faults), round(now - begin, 1), what, particle), now))
                print(f"{now - begin:7.1f} s, step {inject.step()}: {what}, particle {particle}", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(90)
    took, found = time.time() - begin, list(records(folder))
    return Report(
        code=process.returncode,
        log=(folder / "launch.log").read_text()[-3000:],
        seconds=took,
        faults=[(fault, _outcome(fault, at, found, run.particles)) for fault, at in faults],
        starts=sum(record["event"] == "start" for record in found),
        ends=ends(folder),
        processes=inject.left_behind(),
        files=sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".step_")),
        memory=_memory(found, begin, took),
        supervisor=(inject.supervisor_rss[0], inject.supervisor_rss[-1]) if inject.supervisor_rss else (0, 0),
    )


def _outcome(fault: Fault, at: float, found: list[dict[str, Any]], particles: int) -> Outcome:
    syncs = sorted((r for r in found if r["event"] == "sync"), key=lambda r: r["time"])
    after = [sync for sync in syncs if sync["time"] > at + 0.5]
    back = next((s for s in after if len(s["present"]) == particles and all(s["alive"]) and not s["healed"]), None)
    until = back["time"] if back else float("inf")
    missed = {s["step"] for s in after if s["time"] < until and fault.particle not in s["present"]}
    again = [0]
    for particle in range(particles):
        before = [s["step"] for s in syncs if s["particle"] == particle and s["time"] <= at + 0.5]
        later = [s["step"] for s in after if s["particle"] == particle]
        if before and later:
            again.append(before[-1] + INTERVAL - later[0])
    late = back is None or until - at > _BACK_WITHIN_S
    return Outcome(
        missed=len(missed) if fault.particle >= 0 else 0,
        back_s=float("nan") if late else round(until - at, 1),
        again=max(again),
    )


def _memory(found: list[dict[str, Any]], begin: float, took: float) -> tuple[float, float]:
    """Median of those that have run for a minute: what a process takes at its start is not growth."""
    born: dict[int, float] = {}
    for record in found:
        born.setdefault(record["pid"], record["time"])
    grown = [r for r in found if r["event"] == "sync" and r["time"] - born[r["pid"]] > 60]
    first = [r["rss"] for r in grown if r["time"] - begin < took / 3]
    last = [r["rss"] for r in grown if r["time"] - begin > 2 * took / 3]
    return tuple(median(part) if part else float("nan") for part in (first, last))  # type: ignore[return-value]
