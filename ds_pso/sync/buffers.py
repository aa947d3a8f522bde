"""The mean of the particles' buffers: of those that differ, and of no others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_pso.comm.exchange import Exchange, fill
from ds_pso.shards.untrained import digest


def average(exchange: Exchange, buffers: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Let flat buffers become their weighted mean over the particles, in place. Called alike on all peers.

    Statistics are no parameters: whatever the rule, this is what becomes of them. What all particles of a weight have
    alike they keep, to the last bit: a mask of -inf, a table, or a constant that a mean would round.
    """
    rows = exchange.all_gather([float(digest(buffer)) for buffer in buffers])
    members = [particle for particle in exchange.present if weights[particle] != 0]
    first, different, lost = members[0], list[Tensor](), list[Tensor]()
    for number, buffer in enumerate(buffers):
        if any(rows[particle][number] != rows[first][number] for particle in members):
            different.append(buffer)
        elif any(rows[particle][number] != rows[first][number] for particle in exchange.present):
            lost.append(buffer)  # by a particle that has no weight
    fill(different, exchange.weighted_mean(different, weights))
    fill(lost, exchange.from_one(lost, first))
