"""Which particles are left out of a sync point, and why: judged from a table that every rank holds alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Limits:
    """How many times the median of the others is too much; None: nothing is."""

    loss: float | None = 4.0
    norm: float | None = 10.0


USUAL = Limits()


@dataclass(frozen=True)
class Health:
    """What the ranks of a particle found together.

    Attributes:
        loss: NaN if there is none.
        heard: of how many losses since the last sync point it is the mean; 0: of none, and ``loss`` is older;
            -1: it is not finite.
        norm: of all weights and buffers; NaN or infinite if one of them is.
        highest: of the losses that the particle had at sync points before, and of its very first one.
    """

    loss: float
    heard: float
    norm: float
    highest: float


def judge(table: Sequence[Health], limits: Limits) -> dict[int, str]:
    """Why each particle that must be left out must be.

    What is not finite is; then whose norm is more than ``limits.norm`` times the median of the others'. Then whose
    loss is, with l_i the mean of n losses, h_i the highest so far of particle i or the median of these if that is
    higher, and the median over the others::

        l_i / h_i > max(limits.loss * median(l_j / h_j), 1/2 + 16 / n)

    Divided by h_i, particles can be compared whose data are unequally hard, while one with an easy beginning is not
    held to it. The last term is there because where the losses of all are small, one hard sample makes a large ratio,
    and the mean of few losses is mostly chance. The worst goes first, and the rest are judged anew without it.
    Somebody always stays: the best is above no median of the others. Losses that are not above 0 have no ratio, and
    are not compared.
    """
    reasons: dict[int, str] = {}
    for i, health in enumerate(table):
        ill = [what for what, well in _parts(health) if not well]
        if ill:
            reasons[i] = f"its {' and its '.join(ill)} not finite"
    living = [i for i in range(len(table)) if i not in reasons]
    norms = {i: table[i].norm for i in living}
    for i, others in _above(norms, limits.norm, dict.fromkeys(norms, 0.0)).items():
        reasons[i] = f"its weights' norm {norms[i]:.4g} is {norms[i] / others:.3g} times the others' {others:.4g}"
    new = [i for i in living if i not in reasons and table[i].heard > 0]
    highest = {i: table[i].highest for i in new if table[i].loss > 0 and table[i].highest > 0}
    usual = median(highest.values()) if highest else math.nan
    grown = {i: table[i].loss / max(high, usual) for i, high in highest.items()}
    floors = {i: 1 / 2 + 16 / table[i].heard for i in grown}
    for i, others in _above(grown, limits.loss, floors).items():
        reasons[i] = (
            f"its loss {table[i].loss:.4g} is {grown[i]:.3g} times the highest so far, the others' {others:.3g}"
        )
    return reasons


def _parts(health: Health) -> tuple[tuple[str, bool], ...]:
    return ("loss is", health.heard >= 0), ("weights are", math.isfinite(health.norm))


def _above(values: Mapping[int, float], limit: float | None, floors: Mapping[int, float]) -> dict[int, float]:
    """Whose value is above ``limit`` times the median of the others', and above its floor; with that median."""
    found: dict[int, float] = {}
    left = dict(values)
    while limit is not None and len(left) > 1:
        worst = max(left, key=lambda i: (left[i], i))
        value = left.pop(worst)
        others = median(left.values())
        if not (others > 0 and value > limit * others and value > floors[worst]):
            break
        found[worst] = others
    return found


def warning(record: Mapping[str, Any], last: Mapping[str, Any]) -> str | None:
    """One line about the particles that this sync point has left out, and the one before had not.

    Args:
        record, last: of the two, as they are logged; ``left_out`` is there if anybody was.
    """
    before = last.get("left_out", {})
    new = {i: reason for i, reason in record.get("left_out", {}).items() if i not in before}
    if not new:
        return None
    who = "; ".join(f"particle {i}: {reason}" for i, reason in new.items())
    return f"sync point {record['sync']}: left out, and restarted from the others if any is well: {who}"
