"""``python -m benchmarks.soak``: half an hour of an elastic swarm with a random fault every 20 seconds.

``python -m benchmarks.soak each``: a run for each kind of fault instead, compared with undisturbed ones.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.soak.disturb import Fault, Outcome, Report, disturb, undisturbed
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.report import each_fault, random_faults
from benchmarks.soak.run import Run
from benchmarks.table import Table
from ds_pso.utils.atomic_io import write_atomically

FOLDER = Path(__file__).parent / "results"
DEFAULTS = {
    "random": {"steps": 5600, "pace": 0.25, "every": 20.0, "undisturbed": 3, "times": sys.maxsize},
    "each": {"steps": 1400, "pace": 0.06, "every": 10.0, "undisturbed": 4, "times": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    add = parser.add_argument
    add("mode", nargs="?", choices=tuple(DEFAULTS), default="random")
    add("--steps", type=int, help="of each particle")
    add("--pace", type=float, help="seconds that a particle sleeps after each step")
    add("--every", type=float, help="seconds between faults; in mode each, after the one before was mended")
    add("--times", type=int, help="at most so many faults in a run")
    add("--particles", type=int, default=4)
    add("--undisturbed", type=int, help="runs without faults, to compare with")
    add("--seed", type=int, default=0, help="of the faults")
    add("--kinds", nargs="+", choices=tuple(FAULTS), default=list(FAULTS), metavar="FAULT")
    mode = parser.parse_known_args()[0].mode
    parser.set_defaults(**DEFAULTS[mode])
    {"random": _random, "each": _each}[mode](parser.parse_args())


def _random(arguments: argparse.Namespace) -> None:
    chance = random.Random(arguments.seed)
    weights = [FAULTS[kind] for kind in arguments.kinds]
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        calm = _undisturbed(Path(name), arguments)
        run, choose = _run(arguments), lambda: chance.choices(arguments.kinds, weights)[0]
        every, seed, times = arguments.every, arguments.seed, arguments.times
        report = disturb(Path(name) / "run", run, choose, every, seed, times, apart=False)
    if report.code != 0:
        raise SystemExit(report.log)
    csv = FOLDER / "random.csv"
    csv.unlink(missing_ok=True)
    table = Table(csv, Fault, Outcome)
    for row in report.faults:
        table.add(*row)
    _publish("random.md", random_faults(arguments, report, calm))


def _each(arguments: argparse.Namespace) -> None:
    reports: dict[str, Report] = {}
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        calm = _undisturbed(Path(name), arguments)
        for seed, kind in enumerate(arguments.kinds, arguments.seed):
            folder, choose = Path(name) / f"run_{seed}", partial(str, kind)
            run, every, times = _run(arguments), arguments.every, arguments.times
            reports[kind] = disturb(folder, run, choose, every, seed, times, apart=True)
            if reports[kind].code != 0:
                raise SystemExit(reports[kind].log)
            _publish("each.md", each_fault(arguments, reports, calm))


def _undisturbed(folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """As fast as they go."""
    runs = [Run(arguments.steps, particles=arguments.particles, seed=seed) for seed in range(arguments.undisturbed)]
    return [undisturbed(folder / f"undisturbed_{run.seed}", run) for run in runs]


def _run(arguments: argparse.Namespace) -> Run:
    return Run(arguments.steps, arguments.pace, arguments.particles)


def _publish(name: str, lines: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    write_atomically(FOLDER / name, "\n".join(lines))
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
