"""Score functions as a user writes them, found by name."""

from __future__ import annotations

import torch
from torch import nn

_TOKENS = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(1))
calls: list[str] = []


def loss(model: nn.Module) -> float:
    calls.append("loss")
    return float(model(input_ids=_TOKENS[:8], labels=_TOKENS[:8]).loss.detach())


def test_loss(model: nn.Module) -> torch.Tensor:
    calls.append("test")
    return model(input_ids=_TOKENS[8:], labels=_TOKENS[8:]).loss


test_loss.__test__ = False  # not a test of pytest's


def likelihood(model: nn.Module) -> float:
    return -loss(model)


def text(model: nn.Module) -> str:
    return "good"


def with_dropout(model: nn.Module) -> float:
    return float(loss(model) + torch.rand(()))
