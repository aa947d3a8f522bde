"""Who is alive and how each particle fares: numbers on which every rank of the swarm agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ds_pso.errors import SwarmError
from ds_pso.exchange import Exchange
from ds_pso.fitness import FitnessWindow, combine
from ds_pso.rules import SyncPoint
from ds_pso.shards import Shards
from ds_pso.world import World

Probe = Callable[[int], Tensor | float]


class Census:
    """Counts the particles at a sync point.

    Args:
        probe: loss on a batch that is the same for every particle; its argument counts the sync points.
        rank_by: whether that loss is the fitness, or the training loss since the last sync point.
        total: sync points of the whole training, if known.
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
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.shards = shards
        self.probe = probe
        self.rank_by = rank_by
        self.total = total
        self.index = 0  # sync points so far
        self.losses: tuple[float, ...] = (math.nan,) * exchange.num_particles  # at the last one
        self.step_s = math.nan  # of an optimizer step of the slowest particle
        self.held_up_s = 0.0  # see ``Observed``

    def own_row(self, window: FitnessWindow, *, step_s: float, held_up_s: float, needs_loss: bool) -> list[float]:
        """Of this particle, the same bits on all its ranks: loss, whether alive, optimizer steps, and the two times.

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
        rows = self.world.particle_gather([total, count, float(self.shards.all_finite()), step_s, held_up_s])
        fitness, alive = combine(rows)
        if nothing_new:
            fitness = self.losses[self.exchange.particle]
        return [
            fitness,
            float(alive),
            float(window.steps),
            *(max(times) for times in list(zip(*rows, strict=True))[3:]),
        ]

    def of_all(self, mine: Sequence[float], done: float | None) -> SyncPoint:
        """The rows of all particles, the same bits on every rank. ``done``: part of the training, if known."""
        return self._point(self.exchange.all_gather(mine), done)

    def of_one(self, mine: Sequence[float], done: float | None) -> SyncPoint:
        """Where nobody waits for the others, their losses are NaN."""
        table: list[Sequence[float]] = [(math.nan, 1.0, 0.0, 0.0, math.inf)] * self.exchange.num_particles
        table[self.exchange.particle] = mine
        return self._point(table, done)

    def _point(self, table: Sequence[Sequence[float]], done: float | None) -> SyncPoint:
        self.step_s = max(row[3] for row in table) or self.step_s
        self.held_up_s = min(row[4] for row in table)
        return SyncPoint(
            self.index,
            fitness=tuple(row[0] for row in table),
            alive=tuple(row[1] == 1.0 for row in table),
            total=self.total,
            steps=tuple(int(row[2]) for row in table),
            done=done,
        )

    def of_the_last_losses(self) -> SyncPoint:
        """With whose weights are finite now. For a look at the models between two sync points."""
        finite = all(row[0] for row in self.world.particle_gather([float(self.shards.all_finite())]))
        # The last losses: of asynchronous particles, each knows its own alone.
        rows = self.exchange.all_gather([self.losses[self.exchange.particle], float(finite)])
        return SyncPoint(self.index, tuple(row[0] for row in rows), tuple(row[1] == 1.0 for row in rows))

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
