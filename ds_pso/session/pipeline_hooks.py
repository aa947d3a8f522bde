"""Watches a pipeline engine, whose ``train_batch`` is a whole optimizer step."""

from __future__ import annotations

from typing import Any

from ds_pso.errors import SwarmError
from ds_pso.session.data_watch import DataWatch
from ds_pso.session.session import Session
from ds_pso.shards.engine import num_stages

_ALIKE = 1.0  # in place of a hash, on ranks that see no samples


class PipelineHooks:
    """Wraps ``train_batch`` of one engine: its loss is recorded, and a sync made at its end when one is due."""

    def __init__(self, session: Session, engine: Any) -> None:
        self._session = session
        self._engine = engine
        self._train_batch = engine.train_batch
        engine.train_batch = self.train_batch
        if engine.is_first_stage():
            DataWatch(session, engine, engine.module)
        else:  # what arrives here are activations
            session.window.samples = _ALIKE

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the engine's ``train_batch`` does; record the loss, which DeepSpeed tells all ranks, and sync."""
        session = self._session
        loss = self._train_batch(*args, **kwargs)
        session.window.add(loss)
        for sampler in session.samplers:
            for _ in range(self._engine.gradient_accumulation_steps()):
                sampler.advance()
        session.step_has_ended()
        return loss


def check_samplers(session: Session, engine: Any) -> None:
    """Refuse samplers that were made before it was known which ranks see the same data.

    Raises:
        SwarmError: there are some, and the engine has several stages.
    """
    if session.samplers and num_stages(engine) > 1:
        raise SwarmError(
            "swarm.sampler was called before swarm.attach, and the stages of a pipeline must see the same data; call "
            "it after swarm.attach",
            agreed=True,
        )
