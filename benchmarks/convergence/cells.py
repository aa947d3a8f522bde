"""The grids: which runs a table consists of, and which runs find their learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from benchmarks.convergence.tasks import TASKS

SYNCING = ("local_sgd", "diloco", "easgd", "nosync", "pso", "swarm", "line_search")
APART = ("allreduce", "single", "none")  # every step; one worker, all samples; never
RULES = ("allreduce", *SYNCING, "none", "single")

SITUATIONS = {
    "clean": "all particles are well",
    "high_lr": "the learning rate of one particle is 10 times as high",
    "shuffled_labels": "one particle sees random labels, or tokens in random order",
    "half_speed": "one particle makes one step where the others make two",
    "non_iid": "each particle has labels, or files, of its own",
    "lr_spread": "learning rates from 1/4 to 4 times the usual one",
    "all_low": "all learning rates are 16 times too low",
    "all_high": "all learning rates are 8 times too high",
    "nan": "the weights of one particle become NaN in the middle",
}
# About learning rates: all rules start from one rate, that of COMMON, or the better tuned of two would win by it.
RATE_SITUATIONS = ("high_lr", "lr_spread", "all_low", "all_high")
COMMON = "local_sgd"
# With one model in one optimizer, these say nothing, or nothing that "clean" does not say.
NOT_FOR_ALLREDUCE = ("high_lr", "half_speed", "lr_spread")

FAIRNESS = ("clean", "high_lr", "shuffled_labels", "lr_spread", "all_low")  # situations of the table of that name
# Of a rule, what is not its default; by the name in the tables.
VARIANTS: Mapping[str, Mapping[str, Any]] = {"guard only": {"lr_spread": 1.0}, "rates only": {"guard": False}}

WIRES = ("fp32", "bf16", "int8", "int4")
OPTIMIZER_STATES = ("keep", "average", "reset")

SEEDS = (1, 2, 3)
TUNING_SEED = 1000  # and the following, where a task has several
TUNING_PARTICLES = 4
TUNING_INTERVAL = 32  # stands for all but 1, which is as good as synchronous
LR_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)

RateKey = tuple[str, str, int, int]  # task, rule, interval, steps of the tuning runs
Rates = Mapping[RateKey, float]


@dataclass(frozen=True)
class Cell:
    """One run. A run that is on disk with these very values is not done again."""

    task: str
    rule: str
    particles: int  # 1 for "single"; P for "allreduce" too, where it is a part of the batch
    interval: int  # 0: the rule has none
    steps: int  # optimizer steps of each particle
    seed: int
    lr: float = 0.0  # 0: not known yet
    split: Literal["validation", "test"] = "test"
    situation: str = "clean"
    optimizer_state: str = "keep"
    eval_every: int = 0  # steps between evaluations during training; 0: none
    scale: float = 1.0
    wire: str = "fp32"
    delay: int = 0
    fragments: int = 1
    streaming: bool = False
    drift: float = 0.0  # of an adaptive schedule; 0: a fixed one
    warmup: int = 0  # steps at each of which all sync
    variant: str = ""  # of the rule: a key of VARIANTS
    quarantine: bool = False  # whether a particle whose loss is far above the others' is left out
    common: float = 0.0  # the learning rate, as a multiple of that of COMMON; 0: the rule has one of its own

    @property
    def num_worlds(self) -> int:
        """Particles of the swarm that runs it: synchronous training is one."""
        return 1 if self.rule in ("allreduce", "single") else self.particles

    @property
    def batch(self) -> int:
        """Samples per step of all particles together."""
        return self.particles * TASKS[self.task].batch

    @property
    def rate_key(self) -> RateKey:
        """Tells which runs its learning rate comes from: those with as many samples."""
        particles = _tuning_particles(self.rule)
        # Rows of equal steps have different numbers of samples, and share the rate of the others.
        steps = (
            _steps(self.task, particles, self.scale) if self.eval_every else self.steps * self.particles // particles
        )
        if self.common or self.situation in RATE_SITUATIONS:
            return self.task, COMMON, TUNING_INTERVAL, self.steps
        return self.task, self.rule, self.interval if self.interval <= 1 else TUNING_INTERVAL, steps

    def __str__(self) -> str:
        parts = [self.task, self.rule, f"P={self.particles}"]
        parts += [f"n={self.interval}"] if self.interval else []
        parts += [self.situation] if self.situation != "clean" else []
        parts += [self.optimizer_state] if self.optimizer_state != "keep" else []
        parts += [self.wire] if self.wire != "fp32" else []
        parts += [f"d={self.delay}"] if self.delay else []
        parts += [f"F={self.fragments}"] if self.fragments > 1 else []
        parts += ["streaming"] if self.streaming else []
        parts += [f"drift={self.drift:g}"] if self.drift else []
        parts += [f"warmup={self.warmup}"] if self.warmup else []
        parts += [self.variant] if self.variant else []
        parts += ["quarantine"] if self.quarantine else []
        parts += [f"rate x {self.common:g}"] if self.common else []
        parts += [f"equal steps {self.steps}"] if self.eval_every else []
        parts += [f"lr={self.lr:g}"] if self.split == "validation" else []
        return " ".join([*parts, f"seed={self.seed}"])


def cells_of(table: str, scale: float = 1.0) -> list[Cell]:
    """All runs of a table, learning rates left open, one seed after the other."""
    cells = dict.fromkeys(_TABLES[table](scale))  # "single" does not depend on P
    return sorted(cells, key=lambda cell: cell.seed)


def tuning_of(cells: Iterable[Cell]) -> list[Cell]:
    """The runs that find the learning rates of ``cells``."""
    found: dict[Cell, None] = {}
    for cell in cells:
        task, rule, interval, steps = cell.rate_key
        for number, factor in product(range(TASKS[task].tuning_seeds), LR_FACTORS):
            run = Cell(
                task,
                rule,
                _tuning_particles(rule),
                interval,
                steps,
                TUNING_SEED + number,
                lr=TASKS[task].lr * factor,
                split="validation",
                scale=cell.scale,
            )
            found[run] = None
    return list(found)


def tuned_rates(scores: Mapping[Cell, float]) -> Rates:
    """The best on the mean over the tuning seeds, where all tuning runs are there.

    Args:
        scores: what each tuning run reached on the validation data; lower is better, NaN is worst.
    """
    runs: dict[RateKey, dict[float, list[float]]] = {}
    for cell, score in scores.items():
        if cell.interval == cell.rate_key[2]:  # there are old runs at other intervals
            runs.setdefault(cell.rate_key, {}).setdefault(cell.lr, []).append(score)
    rates = {}
    for key, found in runs.items():
        seeds = TASKS[key[0]].tuning_seeds
        means = {lr: sum(several) / seeds for lr, several in found.items() if len(several) == seeds}
        if len(means) >= len(LR_FACTORS):
            rates[key] = min(means, key=lambda lr: (math.isnan(means[lr]), means[lr], lr))
    return rates


def with_rates(cells: Iterable[Cell], rates: Rates) -> list[Cell]:
    """The cells with their learning rates; those whose rate is not known keep 0."""
    return [replace(cell, lr=rates.get(cell.rate_key, 0.0) * (cell.common or 1.0)) for cell in cells]


def _tuning_particles(rule: str) -> int:
    return 1 if rule == "single" else TUNING_PARTICLES


def _steps(task: str, particles: int, scale: float) -> int:
    return round(TASKS[task].samples * scale) // (particles * TASKS[task].batch)


def _grid(
    tasks: Iterable[str],
    particles: Iterable[int],
    intervals: Iterable[int],
    scale: float,
    rules: Iterable[str] = RULES,
    share: float = 1.0,
    seeds: Iterable[int] = SEEDS,
) -> Iterator[Cell]:
    """All combinations; ``share`` of the samples of each task."""
    for task, rule, num, seed in product(tasks, rules, particles, seeds):
        num = 1 if rule == "single" else num
        for interval in [0] if rule in APART else intervals:
            yield Cell(task, rule, num, interval, _steps(task, num, scale * share), seed, scale=scale)


def _papers(scale: float) -> Iterator[Cell]:
    tasks = ("mnist", "cifar10")
    yield from _grid(tasks, (4, 8), (1, 8, 32, 128), scale)
    # Not equal samples but equal steps: more particles see more data in the same time.
    for task, seed in product(tasks, SEEDS):
        steps = _steps(task, 4, scale)
        yield Cell(task, "single", 1, 0, steps, seed, eval_every=64, scale=scale)
        for particles in (2, 4, 8):
            yield Cell(task, "nosync", particles, 32, steps, seed, eval_every=64, scale=scale)


def _transformers(scale: float) -> Iterator[Cell]:
    yield from _grid(("gpt_small", "gpt_medium"), (4,), (8, 32), scale)


def _unequal(scale: float) -> Iterator[Cell]:
    for task, share, seeds in (("mnist", 1 / 4, (*SEEDS, 4, 5)), ("gpt_small", 1.0, SEEDS)):
        for cell in _grid((task,), (4,), (32,), scale, ("allreduce", *SYNCING), share, seeds):
            for situation in SITUATIONS:
                if cell.rule != "allreduce" or situation not in NOT_FOR_ALLREDUCE:
                    yield replace(cell, situation=situation)


def _fairness(scale: float) -> Iterator[Cell]:
    """The rules that help where particles are unequal, part by part, each at three rates that all have in common."""
    rows = [("local_sgd", "", False), ("local_sgd", "", True), ("swarm", "", True)]
    rows += [("swarm", variant, True) for variant in VARIANTS]
    seeds = (*SEEDS, 4, 5)
    for cell in _grid(("mnist",), (4,), (32,), scale, ("local_sgd",), 1 / 4, seeds):
        for (rule, variant, quarantine), common, situation in product(rows, (0.5, 1.0, 2.0), FAIRNESS):
            yield replace(cell, rule=rule, variant=variant, quarantine=quarantine, common=common, situation=situation)


def _optimizer_state(scale: float) -> Iterator[Cell]:
    for cell in _grid(("gpt_small", "cifar10"), (4,), (32,), scale, ("local_sgd", "swarm")):
        for state in OPTIMIZER_STATES:
            yield replace(cell, optimizer_state=state)


def _slow_network(scale: float) -> Iterator[Cell]:
    """Fewer digits, later results, fragments, other schedules: alone, and for the bytes of fp32 at n = 32."""
    plain = [("fp32", n, 0) for n in (32, 16, 8, 4)]
    few_digits = [(wire, 32, 0) for wire in ("bf16", "int8", "int4")]
    equal_bytes = [("bf16", 16, 0), ("int8", 8, 0), ("int4", 4, 0)]
    late = [("fp32", 32, d) for d in (4, 8, 16, 32)] + [("int4", 4, d) for d in (1, 2, 4)] + [("int4", 8, 2)]
    in_fragments = [("fp32", 32, 8, 4), ("fp32", 32, 16, 8), ("fp32", 32, 32, 8), ("int4", 4, 2, 2), ("int4", 4, 4, 4)]
    streaming = [("fp32", 32, d, 4) for d in (1, 4, 8)] + [("int4", 8, 2, 4), ("int4", 4, 1, 2), ("int4", 4, 1, 4)]
    for cell in _grid(("gpt_small",), (4,), (32,), scale, ("allreduce", "local_sgd")):
        if cell.rule == "allreduce":
            yield cell
        else:
            for wire, interval, delay in plain + few_digits + equal_bytes + late:
                yield replace(cell, wire=wire, interval=interval, delay=delay)
            for wire, interval, delay, fragments in in_fragments:
                yield replace(cell, wire=wire, interval=interval, delay=delay, fragments=fragments)
            for wire, interval, delay, fragments in streaming:
                yield replace(cell, wire=wire, interval=interval, delay=delay, fragments=fragments, streaming=True)
            yield replace(cell, warmup=32)
            for drift in (0.1, 0.2, 0.3):
                yield replace(cell, interval=8, drift=drift)


_TABLES = {
    "papers": _papers,
    "transformers": _transformers,
    "unequal": _unequal,
    "fairness": _fairness,
    "optimizer_state": _optimizer_state,
    "slow_network": _slow_network,
}
TABLES = tuple(_TABLES)
