"""A run with faults, and what came of it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.soak.faults import NOBODY, Injector
from benchmarks.soak.run import INTERVAL, Run, ends, records
from benchmarks.soak.worker import AT_ITSELF

_BACK_WITHIN_S = 240.0
_LAST = 0.95  # of the steps: what happens later cannot be mended any more, as nobody syncs then


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
        missed: sync points that the others had without it; if several were lost, that some had without the others.
        back_s: until a sync point with all particles, alive; NaN: it did not come within four minutes.
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


def disturb(
    folder: Path, run: Run, choose: Callable[[], str], every: float, seed: int, times: int, *, apart: bool
) -> Report:
    """A run with at most ``times`` faults; ``choose`` says which.

    Args:
        every: seconds between them.
        apart: whether the next has to wait until the one before is mended, and begins ``every`` seconds after that.
    """
    begin, chance = time.time(), random.Random(seed)
    process = run.launch(folder)
    inject = Injector(folder, process.pid, run.particles)
    asked: list[tuple[float, str, int]] = []
    try:
        while not inject.everybody_trains() and process.poll() is None:
            time.sleep(1)
        while process.poll() is None:
            while apart and asked and process.poll() is None and not _is_mended(*asked[-1], folder, run.particles):
                time.sleep(1)
            time.sleep(every)
            if process.poll() is not None or inject.step() > _LAST * run.steps or len(asked) == times:
                continue
            what = choose()
            now, particle = time.time(), inject.do(what, chance)
            if particle is not None:
                asked.append((now, what, particle))
                print(f"{now - begin:7.1f} s, step {inject.step()}: {what}, particle {particle}", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(90)
    took, found = time.time() - begin, list(records(folder))
    done = [(_done_at(*fault, found), *fault[1:]) for fault in asked]
    faults = [(at, what, particle) for at, what, particle in done if at is not None]
    return Report(
        code=process.returncode,
        log=(folder / "launch.log").read_text()[-3000:],
        seconds=took,
        faults=[
            (Fault(number, round(at - begin, 1), what, particle), _outcome(at, particle, found, run.particles))
            for number, (at, what, particle) in enumerate(faults)
        ],
        starts=sum(record["event"] == "start" for record in found),
        ends=ends(folder),
        processes=inject.left_behind(),
        files=sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".step_")),
        memory=_memory(found, begin, took),
        supervisor=(inject.supervisor_rss[0], inject.supervisor_rss[-1]) if inject.supervisor_rss else (0, 0),
    )


def _done_at(asked: float, what: str, particle: int, found: list[dict[str, Any]]) -> float | None:
    """What a particle is asked to do to itself, it does a little later; or never, if something else kills it before."""
    if what not in AT_ITSELF:
        return asked
    done = (r for r in found if r["event"] == "fault" and (r["what"], r["particle"]) == (what, particle))
    return next((r["time"] for r in done if r["time"] >= asked), None)


def _back(at: float, syncs: list[dict[str, Any]], particles: int) -> float | None:
    """When all synced again, alive, after a fault."""
    after = (s for s in syncs if s["time"] > at + 0.5)
    return next(
        (s["time"] for s in after if len(s["present"]) == particles and all(s["alive"]) and not s["recovered"]), None
    )


def _is_mended(asked: float, what: str, particle: int, folder: Path, particles: int) -> bool:
    found = list(records(folder))
    at = _done_at(asked, what, particle, found)
    return at is not None and _back(at, _syncs(found), particles) is not None


def _syncs(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((r for r in found if r["event"] == "sync"), key=lambda r: r["time"])


def _outcome(at: float, particle: int, found: list[dict[str, Any]], particles: int) -> Outcome:
    syncs = _syncs(found)
    after = [sync for sync in syncs if sync["time"] > at + 0.5]
    until = _back(at, syncs, particles) or math.inf
    needed = {particle} if particle != NOBODY else set(range(particles))
    missed = {s["step"] for s in after if s["time"] < until and not needed <= set(s["present"])}
    again = [0]
    for each in range(particles):
        before = [s["step"] for s in syncs if s["particle"] == each and s["time"] <= at + 0.5]
        later = [s["step"] for s in after if s["particle"] == each]
        if before and later:
            again.append(before[-1] + INTERVAL - later[0])
    back_s = round(until - at, 1)
    return Outcome(len(missed), back_s if back_s < _BACK_WITHIN_S else math.nan, max(again))


def _memory(found: list[dict[str, Any]], begin: float, took: float) -> tuple[float, float]:
    """Median of those that have run for a minute: what a process takes at its start is not growth."""
    born: dict[int, float] = {}
    for record in found:
        born.setdefault(record["pid"], record["time"])
    grown = [r for r in found if r["event"] == "sync" and r["time"] - born[r["pid"]] > 60]
    first = [r["rss"] for r in grown if r["time"] - begin < took / 3]
    last = [r["rss"] for r in grown if r["time"] - begin > 2 * took / 3]
    return tuple(median(part) if part else float("nan") for part in (first, last))  # type: ignore[return-value]
