"""The model that the particles are together, for evaluation and export."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ds_pso.comm.exchange import fill
from ds_pso.errors import ConfigError
from ds_pso.shards import replace
from ds_pso.sync.parts import SyncParts

Choice = Literal["consensus", "best"]


class Consensus:
    """The mean of the finite particles, or what the rule keeps for it (``Rule.model_in``); or the best particle.

    Where no other particle can be reached between two syncs, a particle has only its own to show.
    """

    def __init__(self, parts: SyncParts) -> None:
        self._parts = parts

    def adopt(self, which: Choice) -> None:
        """Let the working weights be those that ``collect`` returns. Called on all ranks."""
        shards = self._parts.shards
        with shards.flat_buffers() as buffers:
            replace([*shards.tensors, *buffers], list(itertools.chain(*self.collect(which))))
        shards.publish()

    @contextlib.contextmanager
    def held(self, which: Choice) -> Iterator[None]:
        """``adopt``, and at the end of the block the weights are what they were before."""
        shards = self._parts.shards
        tensors = shards.tensors
        with shards.flat_buffers() as buffers:
            own = [t.clone() for t in (*tensors, *buffers)]
        try:
            self.adopt(which)
            yield
        finally:
            with shards.flat_buffers() as buffers:
                replace([*tensors, *buffers], own)
            shards.publish()

    def collect(self, which: Choice) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies of the shards and flat buffers of the model.

        Raises:
            ConfigError: no particle has finite weights.
        """
        parts = self._parts
        parts.world.background.settle()  # a sync in the background works on the rule's state
        parts.shards.zero_padding()
        models, model_in = parts.shards.tensors, parts.updater.rule.model_in
        if which == "consensus" and model_in != "x":
            models = [state[model_in] for state in parts.updater.state]
        buffers = [buffer.reshape(-1) for _, buffer in parts.shards.buffers()]
        if len(parts.membership.reachable()) == 1:
            return [t.clone() for t in models], [b.clone() for b in buffers]
        point = parts.assessor.between_syncs()
        if not any(point.alive):
            raise ConfigError("no particle has finite weights, so there is no model; resume an older checkpoint")
        weights = point.best_weights() if which == "best" else point.mean_weights()
        return self._mean(models, weights), self._mean(buffers, weights)

    def _mean(self, tensors: list[Tensor], weights: tuple[float, ...]) -> list[Tensor]:
        mean = [torch.empty_like(t) for t in tensors]
        fill(mean, self._parts.exchange.weighted_mean(tensors, weights))
        return mean
