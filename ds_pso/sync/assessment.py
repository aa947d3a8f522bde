"""Fitness and health of all particles: numbers on which every rank of the swarm agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median

import torch
from torch import Tensor

from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.world import World
from ds_pso.errors import SwarmError
from ds_pso.rules import SyncPoint
from ds_pso.shards import Shards
from ds_pso.sync.expert_load import ExpertLoad
from ds_pso.sync.fitness import FitnessWindow, ParticleReport
from ds_pso.sync.health import USUAL, Limits, judge
from ds_pso.utils.step_timer import StepTimer

Probe = Callable[[int], Tensor | float]


@dataclass(frozen=True)
class Pace:
    """How fast training goes, and for how long the last sync held it up; see ``Observed``."""

    step_s: float = math.nan
    held_up_s: float = 0.0


UNKNOWN_PACE = Pace()


class Assessor:
    """Assesses the particles at a sync.

    Args:
        probe: loss on a batch that is the same for every particle; its argument counts the syncs.
        ranks_by_probe: whether that loss is the fitness, and not the training loss since the last sync.
        needs_loss: whether a first sync without any loss is an error.
        total: syncs of the whole training, if known.
        limits: of particles that are finite, and have diverged all the same.
        samples_per_step: see ``SyncOptions``.
        expert_load: what counts the tokens of each expert on this rank, if somebody does.

    Attributes:
        index: syncs so far.
        losses: of each particle at the last one.
        highest_loss: of this particle, so far.
        pace: that the last sync has found.
        timer: of this rank's optimizer steps.
        held_up_s: how long the last sync held training up on this rank.
        same_samples: groups of particles that have begun with the same ones, as the last sync has found.
        frozen_differs: whether what is not trained differs between the particles, by the last table.
        changed: the particles that have changed it, if others have not.
        compares_all: whether the next report is about all of it, and not a part.
        expert_load_distances: see ``ExpertLoad``, as the last sync has found; empty if nobody counts.
    """

    def __init__(
        self,
        world: World,
        exchange: Exchange,
        shards: Shards,
        *,
        probe: Probe | None = None,
        ranks_by_probe: bool = False,
        needs_loss: bool = False,
        total: int | None = None,
        limits: Limits = USUAL,
        samples_per_step: Callable[[], int] | None = None,
        expert_load: ExpertLoad | None = None,
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.shards = shards
        self.probe = probe
        self.ranks_by_probe = ranks_by_probe
        self.needs_loss = needs_loss
        self.total = total
        self.limits = limits
        self.samples_per_step = samples_per_step
        self.expert_load = expert_load
        self.index = 0
        self.losses: Sequence[float] = (math.nan,) * exchange.num_particles
        self.highest_loss = math.nan
        self.pace = UNKNOWN_PACE
        self.timer = StepTimer()
        self.held_up_s = 0.0
        self.same_samples: Sequence[Sequence[int]] = ()
        self.frozen_differs = False
        self.changed: Sequence[int] = ()
        self.compares_all = True
        self.expert_load_distances: Sequence[float] = ()
        self._tokens = self._no_tokens()  # of this particle, since the particles last compared them

    def report(self, window: FitnessWindow) -> ParticleReport:
        """Report on this particle, with the same bits on all its ranks.

        Raises:
            SwarmError: ``needs_loss``, and no loss was ever seen.
        """
        health = self.shards.health(None if self.compares_all else self.index)
        mine = window.report(health, self.timer.take(), self.held_up_s)
        if self.ranks_by_probe:
            mine = replace(mine, loss_sum=self._probe_loss(), num_losses=1)
        nothing_new = mine.num_losses == 0 and self.index > 0  # a sync right after another
        if mine.num_losses == 0 and self.needs_loss and not nothing_new:
            raise SwarmError(
                "this sync_mode ranks particles by their loss, and none was seen; "
                "call engine.backward(loss), not loss.backward()"
            )
        found = ParticleReport.combined(self.world.local.gather(astuple(mine)), window.steps)
        if self.expert_load is not None:
            rows = [self._tokens, *self.world.local.gather(self.expert_load.take())]
            self._tokens = [sum(column) for column in zip(*rows, strict=True)]
        if math.isnan(self.highest_loss) and not self.ranks_by_probe:
            self.highest_loss = found.highest_loss
        if nothing_new:
            found = replace(found, loss=self.losses[self.exchange.particle])
        trained = 0 if self.samples_per_step is None else window.steps * self.samples_per_step()
        return replace(found, highest_loss=self.highest_loss, trained=trained)

    def gather(self, mine: ParticleReport, done: float | None) -> SyncPoint:
        """Gather the reports of all particles; the same bits on every rank.

        Args:
            done: part of the training, if known.
        """
        point = self._point(ParticleReport.from_rows(self.exchange.all_gather(mine.to_row())), done)
        if self.expert_load is not None:
            self.expert_load_distances = self.expert_load.distances(self.exchange.all_gather(self._tokens))
            self._tokens = self._no_tokens()
        return point

    def _no_tokens(self) -> list[float]:
        return [0.0] * sum(self.expert_load.sizes) if self.expert_load is not None else []

    def alone(self, mine: ParticleReport, done: float | None) -> SyncPoint:
        """Assess this particle alone, where nobody waits for the others: their losses are NaN."""
        table = [ParticleReport.unknown()] * self.exchange.num_particles
        table[self.exchange.particle] = mine
        return self._point(table, done)

    def _point(self, table: list[ParticleReport], done: float | None) -> SyncPoint:
        present = self.world.peers.present
        reports = [table[particle] for particle in present]
        step_s = max(report.step_s for report in reports) or self.pace.step_s
        self.pace = Pace(step_s, min(report.held_up_s for report in reports))
        self.same_samples = _groups({particle: table[particle].samples for particle in present})
        left_out = self._judge(table, present)
        self._compare_frozen({particle: table[particle].frozen for particle in present})
        return SyncPoint(
            self.index,
            fitness=tuple(report.loss for report in table),
            alive=tuple(i not in left_out for i in range(len(table))),
            total=self.total,
            steps=tuple(report.steps for report in table),
            done=done,
            left_out=left_out,
            samples=tuple(report.trained for report in table),
        )

    def _judge(self, reports: Sequence[ParticleReport], present: Sequence[int]) -> dict[int, str]:
        """Return why particles are left out, by their numbers."""
        table = list(reports)
        reasons = {i: "it is not there" for i in range(len(table)) if i not in present}
        reasons |= {i: "it takes over the state of another" for i, report in enumerate(table) if report.recovers}
        for i in reasons:  # nobody is compared with it
            table[i] = ParticleReport(math.nan, 0, math.nan, math.nan, loss_is_finite=False)
        heard = [report.loss for report in table if report.num_losses > 0 and report.loss_is_finite]
        if heard:  # nobody knows the loss on a probe batch before training
            usual = median(heard)
            table = [replace(r, highest_loss=usual) if math.isnan(r.highest_loss) else r for r in table]
        left_out = judge(table, self.limits) | reasons
        mine = table[self.exchange.particle]
        if self.exchange.particle not in left_out and mine.num_losses > 0:
            self.highest_loss = max(mine.loss, mine.highest_loss)
        return left_out

    def _compare_frozen(self, digests: Mapping[int, float]) -> None:
        """Compare what ``ParticleReport.frozen`` says, by particle."""
        known = [value for value in digests.values() if value]
        self.frozen_differs = len(set(map(abs, known))) > 1
        # Where all have changed it, it is training that does.
        kept = self.frozen_differs and max(known) > 0
        self.changed = [particle for particle, value in digests.items() if value < 0] if kept else []
        # Until all is equal: a sync in the background leaves it to the next one.
        self.compares_all = self.frozen_differs

    def between_syncs(self) -> SyncPoint:
        """Judge weights as they are now, for a look at the models between two syncs.

        Losses are the last ones: of asynchronous particles, each knows its own alone, and they may be of weights that
        are gone.
        """
        mine = FitnessWindow().report(self.shards.health(self.index), 0.0, 0.0)
        found = ParticleReport.combined(self.world.local.gather(astuple(mine)), 0)
        found = replace(found, loss=self.losses[self.exchange.particle])
        rows = self.exchange.all_gather(found.to_row())
        left_out = judge(ParticleReport.from_rows(rows), self.limits)
        losses = tuple(row[0] for row in rows)
        return SyncPoint(self.index, losses, tuple(i not in left_out for i in range(len(rows))))

    def distances(self, squares: Sequence[float], point: SyncPoint) -> list[float]:
        """Average ``Updater.take_distance`` over the living particles, of this rank and its peers.

        NaN if there is but one: it has nobody to be apart from.
        """
        rows = self.exchange.all_gather(squares)
        living = [row for row, alive in zip(rows, point.alive, strict=True) if alive]
        if len(living) < 2:
            return [math.nan, math.nan]
        return [sum(column) / len(living) for column in zip(*living, strict=True)]

    def drift(self, distances: Sequence[float]) -> float:
        """Return how far the particles were from what they received: root mean square, relative to its norm.

        Args:
            distances: what ``distances`` returned.
        """
        squares = [sum(column) for column in zip(*self.world.local.gather(list(distances)), strict=True)]
        return math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else math.nan

    def score(self) -> tuple[float, ...]:
        """Return the loss of every particle's present weights on the probe batch, shape (P,); inf if not finite."""
        rows = self.world.local.gather([self._probe_loss()])
        table = self.exchange.all_gather([sum(row[0] for row in rows) / len(rows)])
        return tuple(row[0] if math.isfinite(row[0]) else math.inf for row in table)

    def _probe_loss(self) -> float:
        if self.probe is None:
            raise SwarmError(
                "the rule scores weights on a probe batch, and swarm.attach got none; "
                "let its uses_probe be true, so that this is said at once",
                agreed=True,
            )
        with torch.no_grad():
            return float(self.probe(self.index))


def _groups(samples: Mapping[int, float]) -> list[list[int]]:
    """Return the particles that share a hash, where two or more do; 0 stands for none."""
    groups: dict[float, list[int]] = {}
    for particle, value in samples.items():
        if value:
            groups.setdefault(value, []).append(particle)
    return [group for group in groups.values() if len(group) > 1]
