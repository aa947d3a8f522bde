"""The fitness of a particle: its mean training loss since the last sync point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_pso.shards import Health
from ds_pso.shards.untrained import join_digests

# Sum of the losses, their number, optimizer steps, and the first loss of all; None: there was none.
WindowState = tuple[float, int, int, float | None]
NO_LOSSES: WindowState = (0.0, 0, 0, None)


class FitnessWindow:
    """Sums the losses of one rank. Adding does not wait for the device."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._first: Tensor | float | None = None
        self.count = 0  # of losses
        self.steps = 0  # of the optimizer
        self.samples = 0.0  # a hash of the first ones, which the particles compare; 0: not known

    def add(self, loss: Tensor) -> None:
        """``loss``: scalar of one micro-batch, before any loss scaling."""
        loss = loss.detach().to(torch.float64)
        if self._first is None:
            self._first = loss
        self._sum = self._sum + loss
        self.count += 1

    @property
    def total(self) -> float:
        return float(self._sum)

    @property
    def first(self) -> float:
        """The first loss of all that was ever added; NaN if there was none."""
        return math.nan if self._first is None else float(self._first)

    def report(self, health: Health, step_s: float, held_up_s: float) -> RankReport:
        """Return this rank's part of the particle's report; see there."""
        return RankReport(
            float(self._sum),
            self.count,
            health.square_norm,
            self.first,
            step_s,
            held_up_s,
            health.buffers_square_norm,
            health.odd_buffer_values,
            health.frozen,
            self.samples,
        )

    def state(self) -> WindowState:
        """Return all that ``restore`` needs, the first loss included: later ones are judged by it."""
        return self.total, self.count, self.steps, None if self._first is None else float(self._first)

    def restore(self, total: float, count: int, steps: int, first: float | None) -> None:
        """Go on from what ``state`` returned."""
        self._sum, self.count, self.steps, self._first = total, count, steps, first

    def give_back(self, total: float, count: int, steps: int, first: float | None) -> None:
        """Count again what ``state`` returned before the window was emptied."""
        first = self.state()[3] if first is None else first
        self.restore(self.total + total, self.count + count, self.steps + steps, first)

    def clear(self) -> None:
        """Begin a new window; the first loss stays known."""
        self._sum, self.count, self.steps, self.samples = 0.0, 0, 0, 0.0


@dataclass(frozen=True)
class RankReport:
    """The part of one rank in a ``ParticleReport``; travels inside the particle as a row of float64.

    Attributes:
        loss_sum: of its micro-batches since the last sync.
        num_losses: how many these were.
        square_norm: sum of the squares of the weights that it holds.
        first_loss: the first one of all; NaN if there was none.
        step_s: seconds of an optimizer step; 0 if not known.
        held_up_s: how long the last sync held training up.
        buffers_square_norm: see ``Health``, as what follows.
        samples: a hash of the first samples, a whole number; 0: not known, or compared already.
    """

    loss_sum: float
    num_losses: float
    square_norm: float
    first_loss: float
    step_s: float = 0.0
    held_up_s: float = 0.0
    buffers_square_norm: float = 0.0
    odd_buffer_values: float = 0.0
    frozen: float = 0.0
    samples: float = 0.0


@dataclass(frozen=True)
class ParticleReport:
    """A particle's fitness, health and pace, as it says them at a sync; travels as a row of twelve float64.

    Attributes:
        loss: mean since the last sync; NaN if there is none.
        num_losses: of how many it is the mean; 0: of none, and ``loss`` is older.
        norm: of all weights; NaN or infinite if one of them is.
        highest_loss: of those that the particle had at syncs before, and of its very first one.
        steps: optimizer steps since the last sync.
        step_s: seconds of an optimizer step on its slowest rank; 0 if not known.
        held_up_s: how long the last sync held training up.
        loss_is_finite: false if a loss was heard, and it is no number.
        recovers: it has just taken over the state of another, and its numbers must not count.
        buffers_norm: of the finite values in the buffers of all its ranks.
        odd_buffer_values: see ``Health``; of all its ranks.
        frozen: digest of what is not trained, or of the part whose turn it is; negative if that has changed; 0: nothing
            is compared.
        samples: a hash of the first samples of its ranks; 0: not known, or compared already.
        trained: samples since the last sync, by which the particle counts in a mean; 0: all count alike.
    """

    loss: float
    num_losses: int
    norm: float
    highest_loss: float
    steps: int = 0
    step_s: float = 0.0
    held_up_s: float = 0.0
    loss_is_finite: bool = True
    recovers: bool = False
    buffers_norm: float = 0.0
    odd_buffer_values: int = 0
    frozen: float = 0.0
    samples: float = 0.0
    trained: int = 0

    @classmethod
    def of_recovering(cls) -> ParticleReport:
        """Return the report of a particle that recovers."""
        return cls(math.nan, 0, 0.0, math.nan, held_up_s=math.inf, recovers=True)

    @classmethod
    def unknown(cls) -> ParticleReport:
        """Return the report of a particle of which nothing is known."""
        return cls(math.nan, 0, 0.0, math.nan, held_up_s=math.inf)

    @classmethod
    def combined(cls, rows: Sequence[Sequence[float]], steps: int) -> ParticleReport:
        """Reduce the ``RankReport`` of a particle's ranks, in their order, so that every rank computes the same bits.

        The highest loss is the mean of the ranks' first ones.
        """
        ranks = [RankReport(*row) for row in rows]
        total = sum(rank.loss_sum for rank in ranks)
        count = sum(rank.num_losses for rank in ranks)
        loss = total / count if count else math.nan
        return cls(
            loss,
            int(count),
            math.sqrt(sum(rank.square_norm for rank in ranks)),
            sum(rank.first_loss for rank in ranks) / len(ranks),
            steps,
            max(rank.step_s for rank in ranks),
            max(rank.held_up_s for rank in ranks),
            loss_is_finite=not count or math.isfinite(loss),
            buffers_norm=math.sqrt(sum(rank.buffers_square_norm for rank in ranks)),
            odd_buffer_values=int(sum(rank.odd_buffer_values for rank in ranks)),
            frozen=join_digests([rank.frozen for rank in ranks]) if any(rank.frozen for rank in ranks) else 0.0,
            samples=join_digests([rank.samples for rank in ranks]) if all(rank.samples for rank in ranks) else 0.0,
        )

    def to_row(self) -> list[float]:
        """Write it as float64."""
        heard = -2.0 if self.recovers else float(self.num_losses) if self.loss_is_finite else -1.0
        of_model = [self.buffers_norm, float(self.odd_buffer_values), self.frozen]
        return [
            self.loss,
            heard,
            self.norm,
            self.highest_loss,
            float(self.steps),
            self.step_s,
            self.held_up_s,
            *of_model,
            self.samples,
            float(self.trained),
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> list[ParticleReport]:
        """Read the rows of all particles."""
        return [cls.from_row(row) for row in rows]

    @classmethod
    def from_row(cls, row: Sequence[float]) -> ParticleReport:
        """Read what ``to_row`` has written; NaN stand for a particle that is absent."""
        loss, heard, norm, highest, steps, step_s, held_up_s, buffers_norm, odd, frozen, samples, trained = row
        if math.isnan(heard):
            return cls.unknown()
        count = max(0, int(heard))
        return cls(
            loss,
            count,
            norm,
            highest,
            int(steps),
            step_s,
            held_up_s,
            loss_is_finite=heard >= 0 or heard == -2,
            recovers=heard == -2,
            buffers_norm=buffers_norm,
            odd_buffer_values=int(odd),
            frozen=frozen,
            samples=samples,
            trained=int(trained),
        )
