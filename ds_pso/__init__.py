"""ds_pso: swarms of DeepSpeed ZeRO worlds that meet every n steps instead of every step."""

from ds_pso._version import __version__
from ds_pso.distributed.preemption import EXIT_PREEMPTED
from ds_pso.errors import CheckpointError, ConfigError, PeerError, SwarmError, UnsupportedError
from ds_pso.simulate import simulate
from ds_pso.swarm import Swarm, init

__all__ = [
    "EXIT_PREEMPTED",
    "CheckpointError",
    "ConfigError",
    "PeerError",
    "Swarm",
    "SwarmError",
    "UnsupportedError",
    "__version__",
    "init",
    "simulate",
]
