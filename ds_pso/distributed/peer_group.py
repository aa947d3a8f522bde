"""The process group of a rank's peers: equal shards of all particles. One function for each backend."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pso.distributed.full_duplex_gloo import FullDuplexGloo
from ds_pso.errors import ConfigError, PeerError

_CPU = torch.device("cpu")


class Work(Protocol):
    """A collective that has begun."""

    def wait(self, *timeout: timedelta) -> object: ...


class ProcessGroup(Protocol):
    """The part of a ``dist.ProcessGroup`` that is used; a simulation has one that is none."""

    def allreduce(self, tensors: list[Tensor], /) -> Work: ...
    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions, /) -> Work: ...
    def allgather(self, output: list[list[Tensor]], input: list[Tensor], /) -> Work: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], /
    ) -> Work: ...


@dataclass
class PeerGroup:
    """A process group that torch's default world does not know.

    Attributes:
        group: a ``torch.distributed`` process group, or what has its collectives; None: there are no peers.
        present: the particles in it, in order.
        backend: name of it, for the log.
        device: where the tensors lie that it moves.
    """

    group: ProcessGroup | None = None
    present: Sequence[int] = (0,)
    backend: str = "none"
    device: torch.device = field(default=_CPU)

    def shut(self) -> None:
        """End it in good order; the peers do so, too."""
        group, self.group = self.group, None
        if group is not None and self.backend == "nccl":
            cast(dist.ProcessGroupNCCL, group).shutdown()


def _connect_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> tuple[Any, torch.device]:
    return FullDuplexGloo(store, rank, size, timeout), _CPU


def _connect_nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> tuple[Any, torch.device]:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    options = dist.ProcessGroupNCCL.Options()
    # Longer than the exchange waits, so that an error is raised before the watchdog ends the process.
    options._timeout = 2 * timeout
    return dist.ProcessGroupNCCL(store, rank, size, options), torch.device("cuda", torch.cuda.current_device())


BACKENDS: dict[str, Callable[[dist.Store, int, int, timedelta], tuple[Any, torch.device]]] = {
    "gloo": _connect_gloo,
    "nccl": _connect_nccl,
}


def connect_peers(backend: str, store: dist.Store, particle: int, num_particles: int, timeout_s: float) -> PeerGroup:
    """Build the group of all particles' equal shards. Called on all of them.

    Args:
        backend: "gloo", "nccl", or "auto": NCCL on GPUs and gloo on a CPU.
        store: through which these peers, and nobody else, find each other.

    Raises:
        ConfigError: NCCL without a GPU.
        RuntimeError: they do not connect.
    """
    if backend == "auto":
        backend = "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError('swarm.peer_backend = "nccl": no GPU is visible; use "auto" or "gloo"')
    group, device = BACKENDS[backend](store, particle, num_particles, timedelta(seconds=timeout_s))
    return PeerGroup(group, range(num_particles), backend, device)


@contextlib.contextmanager
def connecting(who: str) -> Iterator[None]:
    """Explain an error of the block, in which ``who`` connects to its peers."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (PeerError, ConfigError)):
            raise
        raise PeerError(
            f"{who}: its peers do not connect ({str(error).splitlines()[0]}); check that "
            "the nodes reach each other on all ports, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where a node "
            "has several networks"
        ) from error
