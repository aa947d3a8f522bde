"""All that ds_pso knows of one optimizer class: how its shards are found, and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_pso.shards.base import Shards
from ds_pso.shards.saved import SavedFormat


@dataclass(frozen=True)
class ShardLayout:
    """An optimizer class that can be trained in a swarm. A module of this package makes one, and the registry lists it.

    Attributes:
        optimizer_class: imports and returns it.
        shards: the masters of an engine with such an optimizer.
        saved: the description of what such an optimizer saves.
    """

    optimizer_class: Callable[[], type]
    shards: type[Shards]
    saved: SavedFormat
