"""Watches a DeepSpeed engine from outside: on overflow its optimizer is not even called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_pso.errors import SwarmError
from ds_pso.session.data_watch import DataWatch
from ds_pso.session.session import Session


class EngineHooks:
    """Wraps ``backward`` and ``step`` of one engine: losses are recorded, and syncs made when they are due."""

    def __init__(self, session: Session, engine: Any) -> None:
        self._session = session
        self._engine = engine
        self._backwards = 0  # since the last optimizer step
        self._divided: list[Tensor] = []  # losses since then, each divided by the number of all of them
        DataWatch(session, engine, engine)
        self._backward, self._step = engine.backward, engine.step
        engine.backward, engine.step = self.backward, self.step

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Do what the engine's ``backward`` does, and record the loss."""
        session = self._session
        result = self._backward(loss, *args, **kwargs)
        # The HF Trainer divides by the micro-batches of this step itself, and says so. How many they are is known
        # when it ends: at the end of an epoch there may be fewer.
        if kwargs.get("scale_wrt_gas") is False:
            self._divided.append(loss.detach())
        else:
            session.window.add(loss)
        self._backwards += 1
        for sampler in session.samplers:
            sampler.advance()
        return result

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the engine's ``step`` does, and sync if the optimizer has taken a step and one is due."""
        engine, session = self._engine, self._session
        before = engine.global_steps
        result = self._step(*args, **kwargs)
        if engine.global_steps == before:
            return result  # gradients are still being accumulated
        if session.samplers and self._backwards == 0:
            raise SwarmError(
                "swarm.sampler counts what was trained on, and saw nothing; "
                "call engine.backward(loss), not loss.backward()"
            )
        for loss in self._divided:
            session.window.add(loss * self._backwards)
        self._divided.clear()
        self._backwards = 0
        session.step_has_ended()
        return result
