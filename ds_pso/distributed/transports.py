"""The registry of transports, from JSON name to the function that builds this rank's world.

Adding a transport is adding a file and a line. Names alone are read without importing anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from ds_pso.distributed.world import World

TRANSPORTS = {
    "static": "ds_pso.distributed.static_world:build",
    "elastic": "ds_pso.elastic.world:build",
}


class TransportOptions(Protocol):
    """Keys of the ``swarm`` section that transports read."""

    @property
    def timeout_s(self) -> float: ...

    @property
    def peer_backend(self) -> str: ...

    @property
    def elastic(self) -> object: ...


def find_transport(name: str) -> Callable[[int | Literal["node"], TransportOptions], World]:
    """Return the function that builds a world for so many particles."""
    module, _, function = TRANSPORTS[name].partition(":")
    found: Callable[[int | Literal["node"], TransportOptions], World] = getattr(
        importlib.import_module(module), function
    )
    return found
