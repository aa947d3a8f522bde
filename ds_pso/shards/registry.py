"""The optimizer classes that ds_pso knows: one module and one line here for each."""

from __future__ import annotations

import torch

from ds_pso.errors import CheckpointError, UnsupportedError
from ds_pso.shards import bf16_optimizer, fp16_flat, fp16_split, fp32, zero3, zero12
from ds_pso.shards.base import Shards
from ds_pso.shards.engine import Engine, why_unsupported
from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.saved import SavedOptimizer

# In order: the first class that the optimizer is an instance of decides.
LAYOUTS: list[ShardLayout] = [
    zero3.LAYOUT,
    zero12.LAYOUT,
    bf16_optimizer.LAYOUT,
    fp16_flat.LAYOUT,
    fp16_split.LAYOUT,
    fp32.LAYOUT,
]


def find_shards(engine: Engine) -> Shards:
    """Return the master shards of this rank.

    Raises:
        UnsupportedError: the engine uses a feature whose shards cannot be read or published.
    """
    reason = why_unsupported(engine)
    if reason:
        raise UnsupportedError(f"ds_pso cannot swarm this engine: {reason}")
    for layout in LAYOUTS:
        if isinstance(engine.optimizer, layout.optimizer_class()):
            return layout.shards(engine)
    raise UnsupportedError(
        f"ds_pso does not know the optimizer class {type(engine.optimizer).__name__}; "
        "use ZeRO stage 0 to 3 with a torch or DeepSpeed optimizer"
    )


def check_precision(shards: Shards) -> None:
    """Refuse to sync masters that are not fp32.

    At ZeRO 0 the parameters themselves are masters, unless the config says ``bf16`` or ``fp16``: so a model that was
    built in half precision has none in fp32.

    Raises:
        UnsupportedError: names their type.
    """
    with shards.mapped(writes=False):
        dtypes = {tensor.dtype for tensor in shards.tensors}
    for dtype in dtypes - {torch.float32}:
        raise UnsupportedError(
            f"ds_pso cannot swarm this engine: its master weights are {dtype}, and sync points need fp32; "
            "give deepspeed.initialize a model in fp32, and set bf16.enabled or fp16.enabled in the config instead"
        )


def saved_optimizer(values: dict[str, object]) -> SavedOptimizer:
    """Return the state of a saved optimizer, whose class is recognised by its keys.

    Raises:
        CheckpointError: it is of none that ds_pso knows.
    """
    for layout in LAYOUTS:
        if layout.saved.recognizes(values):
            return layout.saved.read(values)
    raise CheckpointError(
        f"ds_pso does not know an optimizer whose state has the keys {sorted(values)}; use the ds_pso that saved it"
    )
