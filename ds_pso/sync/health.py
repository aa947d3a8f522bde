"""The particles that are left out of a sync, and why: judged from a table that every rank holds alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ds_pso.metrics.records import SyncRecord
from ds_pso.sync.fitness import ParticleReport


@dataclass(frozen=True)
class Limits:
    """Multiples of the median of the others that are too much; None: nothing is."""

    loss: float | None = 4.0
    norm: float | None = 10.0


USUAL = Limits()
_BUFFERS_NORM = 1e6  # of statistics no data makes as large a ratio, and a flipped top bit of an exponent 2^128


def judge(table: Sequence[ParticleReport], limits: Limits) -> dict[int, str]:
    """Return why each particle that must be left out must be.

    What is not finite is; of buffers, those in which more is not finite than at attach, and not on all particles alike.
    Then whose weights' norm is more than ``limits.norm`` times the median of the others', or whose buffers' norm a
    million times. Then whose loss is, with l_i the mean of n losses, h_i the highest so far of particle i or the median
    of these if that is higher, and the median over the others::

        l_i / h_i > max(limits.loss * median(l_j / h_j), 1/2 + 16 / n)

    Divided by h_i, particles can be compared whose data are unequally hard, while one with an easy beginning is not
    held to it. The last term is there because where the losses of all are small, one hard sample makes a large ratio,
    and the mean of few losses is mostly chance. The worst goes first, and the rest are judged anew without it.
    Somebody always stays: the best is above no median of the others. Losses that are not above 0 have no ratio, and
    are not compared.
    """
    reasons: dict[int, str] = {}
    odd = [report.odd_buffer_values for report in table if math.isfinite(report.norm)]
    by_design = odd[0] if len(odd) > 1 and len(set(odd)) == 1 else 0  # a mask that was filled after attach
    for i, report in enumerate(table):
        ill = [what for what, well in _parts(report, by_design) if not well]
        if ill:
            reasons[i] = f"its {' and its '.join(ill)} not finite"
    living = [i for i in range(len(table)) if i not in reasons]
    norms = {i: table[i].norm for i in living}
    for i, others in _above(norms, limits.norm, dict.fromkeys(norms, 0.0)).items():
        reasons[i] = f"its weights' norm {norms[i]:.4g} is {norms[i] / others:.3g} times the others' {others:.4g}"
    sizes = {i: table[i].buffers_norm for i in norms if i not in reasons}
    limit = None if limits.norm is None else _BUFFERS_NORM
    for i, others in _above(sizes, limit, dict.fromkeys(sizes, _BUFFERS_NORM)).items():
        reasons[i] = f"its buffers' norm {sizes[i]:.4g} is {sizes[i] / others:.3g} times the others' {others:.4g}"
    new = [i for i in living if i not in reasons and table[i].num_losses > 0]
    highest = {i: table[i].highest_loss for i in new if table[i].loss > 0 and table[i].highest_loss > 0}
    usual = median(highest.values()) if highest else math.nan
    grown = {i: table[i].loss / max(high, usual) for i, high in highest.items()}
    floors = {i: 1 / 2 + 16 / table[i].num_losses for i in grown}
    for i, others in _above(grown, limits.loss, floors).items():
        reasons[i] = (
            f"its loss {table[i].loss:.4g} is {grown[i]:.3g} times the highest so far, the others' {others:.3g}"
        )
    return reasons


def _parts(report: ParticleReport, odd_by_design: int) -> tuple[tuple[str, bool], ...]:
    return (
        ("loss is", report.loss_is_finite),
        ("weights are", math.isfinite(report.norm)),
        ("buffers are", report.odd_buffer_values in (0, odd_by_design)),
    )


def _above(values: Mapping[int, float], limit: float | None, floors: Mapping[int, float]) -> dict[int, float]:
    """Return those above ``limit`` times the median of the others, and above their floor; with that median."""
    found: dict[int, float] = {}
    left = dict(values)
    while limit is not None and len(left) > 1:
        worst = max(zip(left.values(), left, strict=True))[1]
        value = left.pop(worst)
        others = median(left.values())
        if not (others > 0 and value > limit * others and value > floors[worst]):
            break
        found[worst] = others
    return found


def warning(record: SyncRecord, before: SyncRecord | None) -> str | None:
    """Return one line about the particles that this sync has left out, and the one ``before`` had not, or restored."""
    known = {} if before is None else before.left_out
    new = {i: reason for i, reason in record.left_out.items() if i not in known}
    said = []
    if new:
        who = "; ".join(f"particle {i}: {reason}" for i, reason in new.items())
        said.append(f"left out, and restarted from the others if any is well: {who}")
    said += [f"particle {i}: {what}" for i, what in record.restored.items()]
    return f"sync point {record.sync}: {'; '.join(said)}" if said else None
