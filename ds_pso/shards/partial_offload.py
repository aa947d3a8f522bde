"""Partial offload at ZeRO 3 (Twin-Flow): the optimizer trains some sub-groups on the CPU, a second one the others.

DeepSpeed saves the state of the first alone, so that the second would begin anew after every resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def second_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return what trains the sub-groups that are not offloaded; None: all are.

    Args:
        optimizer: of DeepSpeed's.
    """
    found: torch.optim.Optimizer | None = getattr(optimizer, "backup_optimizer", None)
    return found if any(device != "cpu" for device in getattr(optimizer, "subgroup_to_device", {}).values()) else None


@contextlib.contextmanager
def in_one_state(optimizer: Any) -> Iterator[None]:
    """In the block the state of both is that of the first, which DeepSpeed saves and loads.

    Args:
        optimizer: of DeepSpeed's, with a second one.
    """
    second = second_optimizer(optimizer)
    assert second is not None
    masters = optimizer.fp32_partitioned_groups_flat
    own = [masters[number] for number, device in optimizer.subgroup_to_device.items() if device != "cpu"]
    _move(own, second, optimizer)
    try:
        yield
    finally:
        _move(own, optimizer, second)


def _move(masters: list[torch.Tensor], source: Any, target: Any) -> None:
    for master in masters:
        if master in source.state:
            target.state[master] = source.state.pop(master)
