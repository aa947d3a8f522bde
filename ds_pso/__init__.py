"""ds_pso: swarms of DeepSpeed ZeRO worlds that sync every n steps instead of every step.

Names are imported when they are first used, so that the commands that need no engine start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ds_pso._version import __version__
from ds_pso.errors import CheckpointError, ConfigError, PeerError, SwarmError, UnsupportedError

if TYPE_CHECKING:
    from ds_pso.distributed.layout import Layout
    from ds_pso.distributed.preemption import EXIT_PREEMPTED
    from ds_pso.metrics.records import SyncRecord
    from ds_pso.simulation import simulate
    from ds_pso.swarm import Swarm, init
    from ds_pso.sync.parts import SyncTotals
else:
    _MODULE_OF = {
        "EXIT_PREEMPTED": "ds_pso.distributed.preemption",
        "Layout": "ds_pso.distributed.layout",
        "Swarm": "ds_pso.swarm",
        "SyncRecord": "ds_pso.metrics.records",
        "SyncTotals": "ds_pso.sync.parts",
        "init": "ds_pso.swarm",
        "simulate": "ds_pso.simulation",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointError",
    "ConfigError",
    "Layout",
    "PeerError",
    "Swarm",
    "SwarmError",
    "SyncRecord",
    "SyncTotals",
    "UnsupportedError",
    "__version__",
    "init",
    "simulate",
]
