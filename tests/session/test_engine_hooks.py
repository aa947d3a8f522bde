"""The losses that the engine's hooks count, as DeepSpeed, Accelerate and the HF Trainer give them."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_pso.session.engine_hooks import EngineHooks
from ds_pso.session.session import Session
from ds_pso.sync.fitness import FitnessWindow


class Engine(nn.Module):
    """Takes an optimizer step when it is told that an accumulation has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.global_steps = 0
        self.boundary = True

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self

    def backward(self, loss: torch.Tensor, **_: Any) -> None:
        pass

    def step(self) -> None:
        self.global_steps += self.boundary

    def gradient_accumulation_steps(self) -> int:
        return 4


def hooked() -> tuple[Engine, FitnessWindow]:
    engine, window = Engine(), FitnessWindow()
    session: Any = SimpleNamespace(window=window, samplers=[], synchronizer=None, num_particles=2)
    session.step_has_ended = MethodType(Session.step_has_ended, session)
    EngineHooks(session, engine)
    return engine, window


def accumulate(engine: Engine, losses: list[float], **how: Any) -> None:
    for number, loss in enumerate(losses):
        engine.boundary = number == len(losses) - 1
        engine.backward(torch.tensor(loss), **how)
        engine.step()


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0, 6.0], [1.0, 5.0]], ids=["whole", "cut short by an epoch's end"])
def test_losses_that_are_divided_already(losses: list[float]) -> None:
    engine, window = hooked()
    accumulate(engine, [loss / len(losses) for loss in losses], scale_wrt_gas=False)
    assert window.count == len(losses)
    assert window.total == pytest.approx(sum(losses))
    assert window.first == pytest.approx(1.0)
    accumulate(engine, [4.0 / len(losses)] * len(losses), scale_wrt_gas=False)
    assert window.total == pytest.approx(sum(losses) + 4 * len(losses)), "nothing of the step before counts again"
    assert window.steps == engine.global_steps == 2


def test_losses_that_deepspeed_divides() -> None:
    engine, window = hooked()
    accumulate(engine, [1.0, 2.0, 3.0, 6.0])
    assert (window.count, window.total, window.first, window.steps) == (4, 12.0, 1.0, 1)
