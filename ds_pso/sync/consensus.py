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
from ds_pso.shards import Shards, replace
from ds_pso.sync.assessment import Assessor
from ds_pso.sync.update import Updater

Choice = Literal["consensus", "best"]


class Consensus:
    """The mean of the finite particles, or what the rule keeps for it (``Rule.model_in``); or the best particle."""

    def __init__(self, assessor: Assessor, updater: Updater, shards: Shards) -> None:
        self.assessor = assessor
        self.updater = updater
        self.shards = shards

    def adopt(self, which: Choice) -> None:
        """Let the working weights be those that ``collect`` returns. Called on all ranks."""
        with self.shards.flat_buffers() as buffers:
            replace([*self.shards.tensors, *buffers], list(itertools.chain(*self.collect(which))))
        self.shards.publish()

    @contextlib.contextmanager
    def held(self, which: Choice) -> Iterator[None]:
        """``adopt``, and at the end of the block the weights are what they were before."""
        shards = self.shards.tensors
        with self.shards.flat_buffers() as buffers:
            own = [t.clone() for t in (*shards, *buffers)]
        try:
            self.adopt(which)
            yield
        finally:
            with self.shards.flat_buffers() as buffers:
                replace([*shards, *buffers], own)
            self.shards.publish()

    def collect(self, which: Choice) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the shards and flat buffers of the model.

        Raises:
            ConfigError: no particle has finite weights.
        """
        self.shards.zero_padding()
        point = self.assessor.of_the_last_losses()
        if not any(point.alive):
            raise ConfigError("no particle has finite weights, so there is no model; resume an older checkpoint")
        weights = point.best_weights() if which == "best" else point.mean_weights()
        models, model_in = self.shards.tensors, self.updater.rule.model_in
        if which == "consensus" and model_in != "x":
            models = [state[model_in] for state in self.updater.state]
        return self._mean(models, weights), self._mean([b.reshape(-1) for _, b in self.shards.buffers()], weights)

    def _mean(self, tensors: list[Tensor], weights: tuple[float, ...]) -> list[Tensor]:
        mean = [torch.empty_like(t) for t in tensors]
        fill(mean, self.updater.exchange.weighted_mean(tensors, weights))
        return mean
