"""The model that the particles are together, for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_pso.comm.exchange import fill
from ds_pso.errors import ConfigError
from ds_pso.shards import replace
from ds_pso.shards.untrained import as_bytes
from ds_pso.sync.buffers import average
from ds_pso.sync.parts import SyncParts

Choice = Literal["consensus", "best"]


@dataclass(frozen=True)
class Collected:
    """Copies of one rank's part of a model.

    Attributes:
        tensors: like the shards.
        buffers: those that are averaged, flat.
        counters: those that are not, such as counts of steps, as flat bytes.
    """

    tensors: list[Tensor]
    buffers: list[Tensor]
    counters: list[Tensor]


class Consensus:
    """The mean of the finite particles, or what the rule keeps for it (``Rule.model_in``); or the best particle.

    With a schedule-free optimizer the mean is of the weights to evaluate, which are not those that train; what a rule
    keeps is made of the latter.

    Buffers that cannot be averaged are those of the first particle in it.

    Where no other particle can be reached between two syncs, a particle has only its own to show.
    """

    def __init__(self, parts: SyncParts) -> None:
        self._parts = parts

    def adopt(self, which: Choice) -> None:
        """Let the working weights be those that ``collect`` returns. Called on all ranks."""
        self._adopt(self.collect(which))

    @contextlib.contextmanager
    def held(self, which: Choice) -> Iterator[None]:
        """``adopt``, and at the end of the block the weights are what they were before."""
        if self._is_own(which):
            yield
            return
        with self._parts.shards.mapped(writes=False):
            own = self._copies(self._parts.shards.tensors)
        try:
            self.adopt(which)
            yield
        finally:
            self._adopt(own)

    def _is_own(self, which: Choice) -> bool:
        """True if the model is what a particle without peers trains."""
        parts = self._parts
        has_peers = len(parts.membership.reachable()) > 1
        evaluates_others = parts.shards.is_schedule_free
        return not has_peers and not evaluates_others and (which == "best" or parts.updater.rule.model_in == "x")

    def _adopt(self, model: Collected) -> None:
        shards = self._parts.shards
        with shards.mapped():
            with shards.flat_buffers() as buffers, as_bytes(shards.frozen.counters()) as counters:
                replace([*shards.tensors, *buffers, *counters], [*model.tensors, *model.buffers, *model.counters])
            shards.publish()

    def _copies(self, models: list[Tensor]) -> Collected:
        shards = self._parts.shards
        with as_bytes(shards.frozen.counters()) as counters:
            buffers = [buffer.reshape(-1).clone() for _, buffer in shards.buffers()]
            return Collected([t.clone() for t in models], buffers, [t.clone() for t in counters])

    def collect(self, which: Choice) -> Collected:
        """Return copies of this rank's part of the model.

        Raises:
            ConfigError: no particle has finite weights.
        """
        self._parts.world.background.settle()  # a sync in the background works on the rule's state
        shards = self._parts.shards
        with shards.mapped(writes=False), shards.evaluating():
            return self._collect(which)

    def _collect(self, which: Choice) -> Collected:
        parts = self._parts
        parts.shards.zero_padding()
        models, model_in = parts.shards.tensors, parts.updater.rule.model_in
        if which == "consensus" and model_in != "x":
            models = [state[model_in] for state in parts.updater.state]
        if len(parts.membership.reachable()) == 1:
            return self._copies(models)
        point = parts.assessor.between_syncs()
        if not any(point.alive):
            raise ConfigError("no particle has finite weights, so there is no model; resume an older checkpoint")
        weights = point.best_weights() if which == "best" else point.mean_weights()
        mean = [torch.empty_like(t) for t in models]
        fill(mean, parts.exchange.weighted_mean(models, weights))
        model = self._copies([])
        if model.buffers:
            average(parts.exchange, model.buffers, weights)
        first = next(particle for particle, weight in enumerate(weights) if weight)
        fill(model.counters, parts.exchange.from_one(model.counters, first))
        return Collected(mean, model.buffers, model.counters)
