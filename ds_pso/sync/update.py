"""Carries out a rule's plan: moves what it asks for, and updates the shards with it, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_pso.comm.compression import Differences
from ds_pso.comm.exchange import Exchange, Piece, fill
from ds_pso.errors import SwarmError
from ds_pso.rules import Place, Plan, Rule
from ds_pso.shards import Segment
from ds_pso.shards.fragments import Fragment, segments_in, states_in
from ds_pso.sync.direction_mean import DirectionMean
from ds_pso.utils.chunks import chunk_numel
from ds_pso.utils.offload import on_device


class Updater:
    """The rule, with the tensors that it keeps from one sync point to the next.

    Attributes:
        state: tensors like the shards, one dict for each of them.
        differences: what the wire keeps; None where weights travel as they are.
        direction_mean: makes means as long as what they are the mean of; None: plain means.
    """

    def __init__(
        self,
        exchange: Exchange,
        rule: Rule,
        segments: Sequence[Segment],
        state: list[dict[str, Tensor]],
        differences: Differences | None,
        direction_mean: DirectionMean | None = None,
    ) -> None:
        self.exchange = exchange
        self.rule = rule
        self.segments = segments
        self.state = state
        self.differences = differences
        self.direction_mean = direction_mean
        self._squares: Tensor | None = None
        self._measures = False
        self._prepares = type(rule).before_exchange is not Rule.before_exchange

    def of(self, fragment: Fragment) -> Updater:
        """One for a fragment, whose ranges it takes for shards. Its state and differences are parts of these."""
        assert self.direction_mean is None, "it is about whole matrices"
        differences = self.differences
        if differences is not None:
            differences = differences.of([(r.shard, slice(r.start, r.stop)) for r in fragment])
        segments = segments_in(fragment, self.segments) if self.rule.per_parameter else []
        return Updater(self.exchange, self.rule, segments, states_in(fragment, self.state), differences)

    def carry_out(
        self, plan: Plan, shards: Sequence[Tensor], message: Sequence[Tensor] | None = None
    ) -> dict[str, Any]:
        """Update the shards in place.

        Args:
            message: shards of a peer that have come already.

        Returns:
            What to log of it.
        """
        for piece, received in self._arriving(plan, shards, message):
            for chunk, name in self._chunks(piece, shards):
                self._update(shards, chunk, received[_within(piece, chunk)], plan, name)
                if self.differences is not None:
                    self._settle(self.differences, plan, piece, chunk, shards)
        return self._note(plan)

    def displace(self, plan: Plan, shards: Sequence[Tensor], *, alive: bool) -> dict[str, Any]:
        """Turn copies of the shards into how far the plan moves them, or into where it puts them if not ``alive``.

        Returns:
            What to log of it.
        """
        for piece, received in self._arriving(plan, shards):
            for chunk, name in self._chunks(piece, shards):
                x = chunk.of(shards[piece.tensor])
                before = x.clone()
                self._update(shards, chunk, received[_within(piece, chunk)], plan, name)
                if self.differences is not None:
                    self._settle(self.differences, plan, piece, chunk, shards)
                if alive:
                    x.sub_(before)
        return self._note(plan)

    def _settle(
        self, differences: Differences, plan: Plan, piece: Piece, chunk: Piece, shards: Sequence[Tensor]
    ) -> None:
        """Take an updated chunk for what all know alike, if the rule leaves all particles equal; add what was not sent.

        What is scored is not settled yet.
        """
        if not self.rule.ends_equal or plan.score:
            return
        x = chunk.of(shards[chunk.tensor])
        chunk.of(differences.common[chunk.tensor]).copy_(x)
        if differences.in_weights and plan.receive == "mean":
            assert differences.rest is not None
            x.add_(piece.in_bucket(differences.rest)[_within(piece, chunk)].to(x))

    def _chunks(self, piece: Piece, shards: Sequence[Tensor]) -> Iterator[tuple[Piece, str]]:
        """A piece in chunks, and the parameter of each if the rule asks for that."""
        parts = [(piece.start, piece.stop, "")]
        if self.rule.per_parameter:
            segments = (s for s in self.segments if s.shard == piece.tensor)
            parts = [
                (max(piece.start, s.shard_start), min(piece.stop, s.shard_start + s.numel), s.name) for s in segments
            ]
        size = chunk_numel(shards[piece.tensor].device)
        for begin, end, name in parts:
            for start in range(begin, end, size):
                yield Piece(piece.tensor, start, min(end, start + size), 0), name

    def _update(self, shards: Sequence[Tensor], chunk: Piece, received: Tensor, plan: Plan, name: str) -> None:
        """Let the rule update a chunk."""
        x = chunk.of(shards[chunk.tensor])
        received = received.to(x)
        if self._measures:
            self._measure(x, received)
        kept = {key: chunk.of(value) for key, value in self.state[chunk.tensor].items()}
        place = Place(self.exchange.particle, name)
        if kept:
            with on_device(kept, x) as state:
                self.rule.update(x, received, state, plan, place)
        else:
            self.rule.update(x, received, {}, plan, place)

    def take_distance(self) -> tuple[float, float]:
        """Return how far this rank's elements were from what arrived first, since this was last called.

        Returns:
            The sums of the squares of the differences, and of what arrived.
        """
        squares, self._squares = self._squares, None
        return (0.0, 0.0) if squares is None else tuple(squares.tolist())  # waits for the device once

    def _measure(self, x: Tensor, received: Tensor) -> None:
        apart = x - received
        assert self._squares is not None
        # Of masters on several devices, those of one are counted on another.
        self._squares[0] += torch.dot(apart, apart).to(self._squares.device)
        self._squares[1] += torch.dot(received, received).to(self._squares.device)

    def _arriving(
        self, plan: Plan, shards: Sequence[Tensor], message: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[Piece, Tensor]]:
        self._measures = plan.receive != "nothing" and self._squares is None
        if self._measures:
            device = shards[0].device if shards else None
            self._squares = torch.zeros(2, dtype=torch.float64, device=device)
        me = Place(self.exchange.particle)
        for number, x in enumerate(shards if self._prepares else []):
            for chunk, _ in self._chunks(Piece(number, 0, x.numel(), 0), shards):
                kept = {key: chunk.of(value) for key, value in self.state[number].items()}
                with on_device(kept, chunk.of(x)) as state:
                    self.rule.before_exchange(chunk.of(x), state, plan, me)
        if message is not None:
            return ((piece, piece.of(message[piece.tensor]).to(x)) for piece, x in self.exchange.from_self(shards))
        outgoing = shards if plan.send == "x" else [state[plan.send] for state in self.state]
        if plan.receive == "mean":
            return self._mean(outgoing, plan) if self.direction_mean is None else self._long_mean(outgoing, plan)
        if plan.receive == "one":
            return self._from_each(outgoing, plan.sources)
        return self.exchange.from_self(shards)

    def _mean(self, outgoing: Sequence[Tensor], plan: Plan) -> Iterator[tuple[Piece, Tensor]]:
        if self.differences is None:
            return self.exchange.weighted_mean(outgoing, plan.weights)
        feedback = not plan.tentative
        return self.exchange.mean_by_differences(outgoing, plan.weights, self.differences, feedback=feedback)

    def _long_mean(self, outgoing: Sequence[Tensor], plan: Plan) -> Iterator[tuple[Piece, Tensor]]:
        """``_mean``, as long as what it is the mean of; that is known when all of it has come."""
        assert self.direction_mean is not None
        assert self.rule.keeps_lengths_from is not None
        origin = [state[self.rule.keeps_lengths_from] for state in self.state]
        lengths = self.direction_mean.equalise(outgoing, origin, plan.weights)
        mean = [torch.empty_like(x) for x in outgoing]
        fill(mean, self._mean(outgoing, plan))
        self.direction_mean.stretch(mean, origin, lengths)
        return self.exchange.from_self(mean)

    def _from_each(self, outgoing: Sequence[Tensor], sources: Sequence[int]) -> Iterator[tuple[Piece, Tensor]]:
        if self.differences is None:
            return self.exchange.from_each(outgoing, sources)
        if len(set(sources)) > 1:
            raise SwarmError(
                "swarm.wire: the rule gives each particle something else, and only what all receive can be sent as a "
                'difference; let its receives_alike be false, or use "fp32"',
                agreed=True,
            )
        return self.exchange.from_one_by_differences(outgoing, sources[0], self.differences)

    @staticmethod
    def _note(plan: Plan) -> dict[str, Any]:
        moved: dict[str, dict[str, Any]] = {"mean": {"weights": plan.weights}, "one": {"sources": plan.sources}}
        return {**plan.note, **moved.get(plan.receive, {})}


def _within(piece: Piece, chunk: Piece) -> slice:
    return slice(chunk.start - piece.start, chunk.stop - piece.start)
