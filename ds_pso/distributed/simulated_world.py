"""P particles as threads of one process, of which one runs at a time: worlds without a network.

Everything above sees an ordinary ``World`` of P particles of one rank. The threads take turns at the
sync points, in the order of particles, each with its own random state; so a run is reproducible, and no
faster or slower particle changes what comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pso.distributed.coordinator import Coordinator, StoreCoordinator, agreement
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.local_group import TorchLocalGroup
from ds_pso.distributed.mailbox import Mailbox, Message
from ds_pso.distributed.membership import StaticMembership
from ds_pso.distributed.peer_group import PeerGroup
from ds_pso.distributed.static_world import carve
from ds_pso.distributed.thread_scheduler import ThreadScheduler, process_state, set_process_state
from ds_pso.distributed.world import World
from ds_pso.errors import ConfigError, PeerError
from ds_pso.utils.background_task import Background, Task

Value = TypeVar("Value")


def simulated_world(scheduler: ThreadScheduler, particle: int, timeout_s: float) -> World:
    """Build the world as one simulated particle sees it."""
    size = scheduler.size
    layout = Layout(particle, size, size)
    coordinator = ThreadCoordinator(scheduler, layout, timeout_s)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peers = PeerGroup(_PeerGroup(scheduler, particle), range(size), "simulated", device) if size > 1 else PeerGroup()
    return World(
        layout,
        coordinator,
        TorchLocalGroup(layout),
        StaticMembership(layout, coordinator),
        lambda: _ThreadMailbox(scheduler, particle),
        peers=peers,
        background=Background(inline=True),  # only one thread runs at a time
        owns_torch=False,
    )


class ThreadCoordinator:
    """A ``Coordinator`` of particles that are threads of one process. Nobody can be missing, so barriers do nothing."""

    def __init__(self, scheduler: ThreadScheduler, layout: Layout, timeout_s: float) -> None:
        self._scheduler = scheduler
        self.layout = layout
        self.timeout_s = timeout_s
        self.ranks: Sequence[int] = range(layout.world_size)
        self._host = socket.gethostname()

    @property
    def is_leader(self) -> bool:
        return self.layout.rank == 0

    @property
    def local_ranks_on_this_node(self) -> list[int]:
        return self.layout.local_ranks

    def describe(self, rank: int) -> str:
        return f"particle {rank}, rank 0 (rank {rank} on host {self._host})"

    def barrier(self, label: str, ranks: Iterable[int]) -> None:
        """Nothing to do: what follows is an exchange anyway."""

    def next_barrier(self, label: str, ranks: Sequence[int], *, with_local_ranks: bool = False) -> None:
        """Nothing to do."""

    def turn(self, label: str) -> int:
        return 0

    def gather(self, label: str, value: Value) -> list[Value]:
        values: list[str] = self._scheduler.exchange(self.layout.rank, json.dumps(value))
        return [json.loads(item) for item in values]

    def agree(self, label: str) -> contextlib.AbstractContextManager[None]:
        return agreement(self, label)

    def leads_disk(self, folder: Path) -> bool:
        with self.agree("finding who shares a disk"):
            if self.is_leader:
                folder.mkdir(parents=True, exist_ok=True)
        return self.is_leader

    def beside(self, job: Callable[[Coordinator], None]) -> Task | None:
        job(self)
        return None

    def second_connection(self, timeout_s: float | None = None) -> StoreCoordinator:
        return StoreCoordinator(self.layout, timeout_s or self.timeout_s, Background())

    def confine(self, store: dist.Store, patience_s: float) -> None:
        """Nobody is lost: an error ends the simulation."""

    def say_closed(self, steps: int) -> None:
        """Nothing to do: the others find a thread that has ended."""

    def leave(self, patience: timedelta) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        """Nothing to do."""


class _Done:
    def wait(self, *_: Any) -> None:
        pass


class _PeerGroup:
    """The collectives of a torch process group that the exchange uses."""

    def __init__(self, scheduler: ThreadScheduler, me: int) -> None:
        self._scheduler, self._me = scheduler, me

    def allreduce(self, tensors: list[Tensor]) -> _Done:
        def add(values: list[Tensor]) -> Tensor:
            total = values[0].clone()
            for value in values[1:]:
                total += value
            return total

        tensors[0].copy_(self._scheduler.exchange(self._me, tensors[0], add))
        return _Done()

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Done:
        root = options.rootRank
        tensors[0].copy_(self._scheduler.exchange(self._me, tensors[0], lambda values: values[root].clone()))
        return _Done()

    def allgather(self, rows: list[list[Tensor]], mine: list[Tensor]) -> _Done:
        values = self._scheduler.exchange(self._me, mine[0], lambda values: [value.clone() for value in values])
        for row, value in zip(rows[0], values, strict=True):
            row.copy_(value)
        return _Done()

    def alltoall_base(self, output: Tensor, given: Tensor, _: Sequence[int], splits: Sequence[int]) -> _Done:
        def deal(values: list[tuple[Tensor, ...]]) -> list[Tensor]:
            return [torch.cat([parts[i] for parts in values]) for i in range(len(values))]

        output.copy_(self._scheduler.exchange(self._me, given.split(list(splits)), deal)[self._me])
        return _Done()


class _ThreadMailbox(Mailbox):
    """Messages arrive at once; the others then go on to their own next sync point."""

    def __init__(self, scheduler: ThreadScheduler, particle: int) -> None:
        scheduler.mailboxes[particle] += 1  # an earlier one was for another training
        self._scheduler, self._number, self._me = scheduler, scheduler.mailboxes[particle], particle

    def busy(self, peer: int) -> bool:
        return False

    def send(self, tensors: Sequence[Tensor], index: int, peer: int) -> None:
        flat = torch.cat([t.detach().to("cpu", torch.float32).view(-1) for t in tensors])
        address = (self._number, peer)
        self._scheduler.message_bytes[address] += 4 * flat.numel()
        there = self._scheduler.messages.get(address)
        if there is None or index >= there.index:
            self._scheduler.messages[address] = Message(self._me, index, flat)
        self._scheduler.pause(self._me)

    def newest(self) -> Message | None:
        return self._scheduler.messages.get((self._number, self._me))

    def drop(self, message: Message) -> None:
        if self.newest() is message:
            del self._scheduler.messages[self._number, self._me]

    @property
    def bytes_received(self) -> int:
        return self._scheduler.message_bytes[self._number, self._me]


class Simulation:
    """The threads of one simulation, all running the same function.

    The first runs alone until it asks to join; only then is the number of particles known.
    """

    _here: ClassVar[threading.local] = threading.local()

    def __init__(self, body: Callable[[], Any]) -> None:
        self._body = body
        self._scheduler: ThreadScheduler | None = None
        self._threads: list[threading.Thread] = []
        self._results: dict[int, Any] = {}
        self._errors: list[BaseException] = []  # in the order in which they were raised
        self._state = process_state()
        self._stopped = False

    @classmethod
    def world(cls, particles: int | Literal["node"], timeout_s: float) -> World | None:
        """The world of the calling thread, if it belongs to a simulation."""
        simulation = getattr(cls._here, "simulation", None)
        return None if simulation is None else simulation._join(cls._here.particle, particles, timeout_s)

    def run(self) -> list[Any]:
        """Run all particles; return what the function has returned to each.

        Raises:
            Whatever the function raised first.
        """
        _be_a_world_of_one()
        self._start(0)
        try:
            for thread in self._threads:  # grows while the first one runs
                thread.join()
        except BaseException:  # Ctrl-C
            self._stop()
            raise
        if self._errors:
            raise self._errors[0]
        return [self._results[particle] for particle in sorted(self._results)]

    def _start(self, particle: int) -> None:
        thread = threading.Thread(target=self._live, args=(particle,), daemon=True, name=f"particle {particle}")
        self._threads.append(thread)
        thread.start()

    def _live(self, particle: int) -> None:
        self._here.simulation, self._here.particle = self, particle
        if self._scheduler is not None:
            self._scheduler.enter(particle)
        set_process_state(self._state)
        try:
            self._results[particle] = self._body()
        except BaseException as error:
            self._errors.append(error)
            self._stop()
        finally:
            if self._scheduler is not None:
                self._scheduler.leave(particle)

    def _stop(self) -> None:
        self._stopped = True
        if self._scheduler is not None:
            self._scheduler.stop()

    def _join(self, particle: int, particles: int | Literal["node"], timeout_s: float) -> World:
        if particles == "node":
            raise ConfigError('swarm.particles = "node": a simulation has no nodes; give a number')
        if self._stopped:
            raise PeerError(f"particle {particle}: the simulation was stopped")
        if self._scheduler is None:
            self._scheduler = ThreadScheduler(particles)
            for other in range(1, particles):
                self._start(other)
        if particles != self._scheduler.size:
            raise ConfigError(
                f"swarm.particles = {particles}: this simulation began with {self._scheduler.size}; use one number"
            )
        return simulated_world(self._scheduler, particle, timeout_s)


_process: World | None = None  # kept: it hosts the store of torch's world


def _be_a_world_of_one() -> None:
    """DeepSpeed's world is this process, from now on; it cannot be built a second time."""
    global _process
    if _process is not None:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a simulation is one process; start it with python, not with a launcher of several ranks")
    _process = carve(1)
