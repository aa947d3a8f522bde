"""What DeepSpeed's own checkpoints leave out at ZeRO 3, and how they hold it all the same.

Of an optimizer on NVMe they hold copies of the swap files: loading these, DeepSpeed forgets that the optimizer had
moments and has taken steps, and they can be read neither on another number of ranks nor without an engine. Working
weights on NVMe cannot be loaded at all. Of an optimizer that is offloaded in part, the rest is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ds_pso.shards.nvme import NvmeOffload, has_weights_on_nvme, working_weights_in_memory
from ds_pso.shards.partial_offload import in_one_state, second_optimizer


def leaves_something_out(engine: Any) -> bool:
    """Return true if DeepSpeed's checkpoints of this engine would not resume it as it was."""
    optimizer = engine.optimizer
    swaps = NvmeOffload.of(optimizer) is not None or has_weights_on_nvme(optimizer)
    return swaps or second_optimizer(optimizer) is not None


@contextlib.contextmanager
def all_in_its_files(engine: Any, *, loads: bool) -> Iterator[None]:
    """In the block the engine saves all of its state into the files that it writes at ZeRO 3, or loads it from them.

    Args:
        engine: of DeepSpeed.
        loads: which of the two the block does.
    """
    optimizer = engine.optimizer
    offload = NvmeOffload.of(optimizer)
    with contextlib.ExitStack() as stack:
        if offload is not None:
            stack.enter_context(offload.mapped(writes=loads))
        if loads and has_weights_on_nvme(optimizer):
            stack.enter_context(working_weights_in_memory(optimizer))
        if second_optimizer(optimizer) is not None:
            stack.enter_context(in_one_state(optimizer))
        if offload is not None:
            stack.enter_context(_as_if_in_memory(engine))
        yield


@contextlib.contextmanager
def _as_if_in_memory(engine: Any) -> Iterator[None]:
    engine.optimizer.swap_optimizer, engine.zero_nvme_offload_optimizer = False, lambda: False
    try:
        yield
    finally:
        engine.optimizer.swap_optimizer = True
        del engine.zero_nvme_offload_optimizer
