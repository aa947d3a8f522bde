"""Which runs are missing: first those that find the best learning rate of each setting, then the other seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.levers.results import Outcome, Run
from benchmarks.levers.settings import FIRST_RATE, SEEDS, Setting

_FACTOR = 2.0
_NARROW = 2.0**0.5


def tried(setting: Setting, rows: Mapping[Run, Outcome]) -> dict[float, float]:
    """Return the validation loss by the rate, of those tried with the first seed; infinite where it diverged."""
    found = {run.lr: rows[run].validation_loss for run in rows if run.setting == str(setting) and run.seed == SEEDS[0]}
    return {lr: loss if math.isfinite(loss) else math.inf for lr, loss in sorted(found.items())}


def best_rate(setting: Setting, rows: Mapping[Run, Outcome], factor: float = _FACTOR) -> float | None:
    """Return the best rate so far, as ``interior_optimum`` says."""
    return interior_optimum(tried(setting, rows), factor)


def next_rate(setting: Setting, rows: Mapping[Run, Outcome], factor: float = _FACTOR) -> float | None:
    """Return the rate to try next; None if the best one is known."""
    return rate_to_try(tried(setting, rows), FIRST_RATE[setting.inner], factor)


def interior_optimum(found: Mapping[float, float], factor: float = _FACTOR) -> float | None:
    """Return the best rate if it has worse ones at both sides, no farther than ``factor``; None if not yet.

    Args:
        found: loss by the rate; infinite where training diverged.
    """
    if not found:
        return None
    best = min(found, key=lambda lr: found[lr])
    near = [lr for lr in found if lr != best and 1 / factor - 1e-9 <= lr / best <= factor + 1e-9]
    return best if any(lr < best for lr in near) and any(lr > best for lr in near) else None


def rate_to_try(found: Mapping[float, float], first: float, factor: float = _FACTOR) -> float | None:
    """Return the rate that is tried after those of ``found``; None if the optimum is known."""
    if not found:
        return first
    if interior_optimum(found, factor) is not None:
        return None
    best = min(found, key=lambda lr: found[lr])
    for candidate in (best * factor, best / factor):
        if not any(math.isclose(candidate, lr, rel_tol=0.01) for lr in found):
            return float(f"{candidate:.4g}")
    return None


def missing(settings: Sequence[Setting], rows: Mapping[Run, Outcome], *, seeds: int) -> list[Run]:
    """Return the runs that can be started now, in the order in which they are wanted.

    Args:
        seeds: of each setting whose rate is known.
    """
    wanted: dict[Run, None] = {}
    for setting in settings:
        lr = next_rate(setting, rows)
        if lr is not None:
            wanted[Run(str(setting), lr, SEEDS[0])] = None
    for seed in SEEDS[1:seeds]:
        for setting in settings:
            lr = best_rate(setting, rows)
            if lr is not None and Run(str(setting), lr, seed) not in rows:
                wanted[Run(str(setting), lr, seed)] = None
    return list(wanted)
