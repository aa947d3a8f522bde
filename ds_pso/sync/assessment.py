"""Who is alive and how each particle fares: numbers on which every rank of the swarm agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.world import World
from ds_pso.errors import SwarmError
from ds_pso.rules import SyncPoint
from ds_pso.shards import Shards
from ds_pso.sync.fitness import FitnessWindow, combine
from ds_pso.sync.health import USUAL, Health, Limits, judge

_STRANGER = -2.0  # in the place of ``Health.heard``

Probe = Callable[[int], Tensor | float]


class Assessor:
    """Counts the particles at a sync point.

    Args:
        probe: loss on a batch that is the same for every particle; its argument counts the sync points.
        rank_by: whether that loss is the fitness, or the training loss since the last sync point.
        total: sync points of the whole training, if known.
        limits: of particles that are finite, and mad all the same.
    """

    def __init__(
        self,
        world: World,
        exchange: Exchange,
        shards: Shards,
        *,
        probe: Probe | None,
        rank_by: Literal["train", "probe"],
        total: int | None,
        limits: Limits = USUAL,
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.shards = shards
        self.probe = probe
        self.rank_by = rank_by
        self.total = total
        self.limits = limits
        self.index = 0  # sync points so far
        self.losses: tuple[float, ...] = (math.nan,) * exchange.num_particles  # at the last one
        self.highest_loss = math.nan  # of this particle, so far
        self.step_s = math.nan  # of an optimizer step of the slowest particle
        self.held_up_s = 0.0  # see ``Observed``

    def own_row(self, window: FitnessWindow, *, step_s: float, held_up_s: float, needs_loss: bool) -> list[float]:
        """Of this particle, the same bits on all its ranks: its ``Health``, optimizer steps, and the two times.

        Args:
            step_s: of an optimizer step of this rank; 0 if not known.
            held_up_s: how long the last sync point held training up on this rank.

        Raises:
            SwarmError: ``needs_loss``, and no loss was ever seen.
        """
        total, count = window.total, float(window.count)
        if self.rank_by == "probe":
            total, count = self._probe_loss(), 1.0
        nothing_new = count == 0 and self.index > 0  # a sync point right after another
        if count == 0 and needs_loss and not nothing_new:
            raise SwarmError(
                "this sync_mode ranks particles by their loss, and none was seen; "
                "call engine.backward(loss), not loss.backward()"
            )
        mine = [total, count, self.shards.square_norm(), window.first, step_s, held_up_s]
        rows = self.world.particle_gather(mine)
        health = combine(rows)
        if math.isnan(self.highest_loss) and self.rank_by == "train":
            self.highest_loss = health.highest
        return [
            self.losses[self.exchange.particle] if nothing_new else health.loss,
            health.heard,
            health.norm,
            self.highest_loss,
            float(window.steps),
            *(max(times) for times in list(zip(*rows, strict=True))[4:]),
        ]

    def row_of_a_stranger(self) -> list[float]:
        """Of a particle that has just taken over the state of another: its numbers must not count."""
        return [math.nan, _STRANGER, 0.0, math.nan, 0.0, 0.0, math.inf]

    def of_all(self, mine: Sequence[float], done: float | None) -> SyncPoint:
        """The rows of all particles, the same bits on every rank. ``done``: part of the training, if known."""
        return self._point(self.exchange.all_gather(mine), done)

    def of_one(self, mine: Sequence[float], done: float | None) -> SyncPoint:
        """Where nobody waits for the others, their losses are NaN, and nobody can be compared."""
        table: list[Sequence[float]] = [
            (math.nan, 0.0, 0.0, math.nan, 0.0, 0.0, math.inf)
        ] * self.exchange.num_particles
        table[self.exchange.particle] = mine
        return self._point(table, done)

    def _point(self, table: Sequence[Sequence[float]], done: float | None) -> SyncPoint:
        present = [table[particle] for particle in self.exchange.present]
        self.step_s = max(row[5] for row in present) or self.step_s
        self.held_up_s = min(row[6] for row in present)
        left_out = self._judge([Health(*row[:4]) for row in table])
        return SyncPoint(
            self.index,
            fitness=tuple(row[0] for row in table),
            alive=tuple(i not in left_out for i in range(len(table))),
            total=self.total,
            steps=tuple(0 if math.isnan(row[4]) else int(row[4]) for row in table),
            done=done,
            left_out=left_out,
        )

    def _judge(self, healths: list[Health]) -> dict[int, str]:
        """Who is left out, and why."""
        reasons = {i: "it is not there" for i in range(len(healths)) if i not in self.exchange.present}
        reasons |= {i: "it takes over the state of another" for i, h in enumerate(healths) if h.heard == _STRANGER}
        for i in reasons:
            healths[i] = Health(math.nan, -1.0, math.nan, math.nan)  # nobody is compared with it
        heard = [health.loss for health in healths if health.heard > 0]
        if heard:  # nobody knows the loss on a probe batch before training
            usual = median(heard)
            healths = [replace(h, highest=usual) if math.isnan(h.highest) else h for h in healths]
        left_out = judge(healths, self.limits) | reasons
        mine = healths[self.exchange.particle]
        if self.exchange.particle not in left_out and mine.heard > 0:
            self.highest_loss = max(mine.loss, mine.highest)
        return left_out

    def of_the_last_losses(self) -> SyncPoint:
        """With whose weights are well now. For a look at the models between two sync points."""
        norm = math.sqrt(sum(row[0] for row in self.world.particle_gather([self.shards.square_norm()])))
        # The last losses: of asynchronous particles, each knows its own alone. They may be of weights that are gone.
        rows = self.exchange.all_gather([self.losses[self.exchange.particle], 0.0, norm, math.nan])
        left_out = judge([Health(*row) for row in rows], self.limits)
        return SyncPoint(self.index, tuple(row[0] for row in rows), tuple(i not in left_out for i in range(len(rows))))

    @staticmethod
    def record_of(point: SyncPoint) -> dict[str, Any]:
        """What to log of it."""
        record = {"sync": point.index, "losses": point.fitness, "alive": point.alive}
        # Names of a JSON object are strings; so the record is the same before and after a checkpoint.
        left_out = {str(i): reason for i, reason in point.left_out.items()}
        return record | ({"left_out": left_out} if left_out else {})

    def apart(self, squares: Sequence[float], point: SyncPoint) -> list[float]:
        """Of the living particles, the mean of ``Updater.take_distance``; of this rank and its peers.

        NaN if there is but one: it has nobody to be apart from.
        """
        rows = self.exchange.all_gather(squares)
        living = [row for row, alive in zip(rows, point.alive, strict=True) if alive]
        if len(living) < 2:
            return [math.nan, math.nan]
        return [sum(column) / len(living) for column in zip(*living, strict=True)]

    def drift(self, apart: Sequence[float]) -> float:
        """How far the particles were from what they received: root mean square, relative to its norm.

        Args:
            apart: what ``apart`` returned.
        """
        squares = [sum(column) for column in zip(*self.world.particle_gather(list(apart)), strict=True)]
        return math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else math.nan

    def score(self) -> tuple[float, ...]:
        """Loss of every particle's present weights on the probe batch, shape (P,); inf if not finite."""
        rows = self.world.particle_gather([self._probe_loss()])
        table = self.exchange.all_gather([sum(row[0] for row in rows) / len(rows)])
        return tuple(row[0] if math.isfinite(row[0]) else math.inf for row in table)

    def _probe_loss(self) -> float:
        if self.probe is None:
            raise SwarmError(
                "the rule scores weights on a probe batch, and swarm.attach got none; "
                "let its uses_probe be true, so that this is told at once",
                agreed=True,
            )
        with torch.no_grad():
            return float(self.probe(self.index))
