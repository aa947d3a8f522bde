"""The environment variables that describe a particle to DeepSpeed, Accelerate and the HF Trainer."""

from __future__ import annotations

import os

import torch.distributed as dist

from ds_pso.distributed import tcp_store
from ds_pso.distributed.layout import Layout

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


class ParticleEnvironment:
    """Remembers what the launcher has set, and hosts the store of the particle's world."""

    def __init__(self) -> None:
        self._saved: dict[str, str | None] = {}
        self._store: dist.TCPStore | None = None  # lives as long as the world

    def host_store(self, address: str) -> int:
        """Host the particle's store, and return its port.

        It is handed to torch as an agent's store: so the system may pick the port, and no port is
        free for a moment and taken by another the next.
        """
        self._store = tcp_store.host(address)
        return self._store.port

    def describe(self, layout: Layout, ranks_on_this_node: int, address: str, port: int) -> None:
        """Let the environment describe a world of one particle, whose store is at ``address:port``."""
        self._saved = {name: os.environ.get(name) for name in _NAMES}
        os.environ.update(
            RANK=str(layout.shard_rank),
            WORLD_SIZE=str(layout.particle_size),
            LOCAL_WORLD_SIZE=str(ranks_on_this_node),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )

    def describe_lone_rank(self, layout: Layout) -> None:
        """Do what a launcher would, for plain ``python script.py``: a world of one rank."""
        os.environ.setdefault("LOCAL_RANK", "0")
        self.describe(layout, 1, "127.0.0.1", self.host_store("127.0.0.1"))

    def take_store(self) -> dist.TCPStore | None:
        """Hand over the store that this process hosts, if it does."""
        store, self._store = self._store, None
        return store

    def restore(self) -> None:
        """Put back what the launcher has set."""
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved, self._store = {}, None
