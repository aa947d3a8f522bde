"""P particles as threads of one process, of which one runs at a time: worlds without a network.

Everything above sees an ordinary ``World`` of P particles of one rank. The threads take turns at the
sync points, in the order of particles, each with its own random state; so a run is reproducible, and no
faster or slower particle changes what comes out.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ds_pso.distributed.coordinator import Coordinator
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.mailbox import Mailbox, Message
from ds_pso.distributed.thread_scheduler import Room, process_state, set_process_state
from ds_pso.distributed.world import World
from ds_pso.errors import ConfigError, PeerError


class SimulatedWorld(World):
    """The world as one simulated particle sees it."""

    def __init__(self, room: Room, particle: int, timeout_s: float) -> None:
        super().__init__(Layout(particle, room.size, room.size), timeout_s)
        self._room = room
        self._hosts = [socket.gethostname()] * room.size
        if room.size > 1:
            self.backend = "simulated"
            self.peer_group = _PeerGroup(room, particle)

    @property
    def peer_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def barrier(self, label: str, ranks: Iterable[int]) -> None:
        """Nobody is missing: what follows is a meeting anyway."""

    def barrier_with_local_ranks(self, label: str, ranks: Iterable[int]) -> None:
        """As ``barrier``."""

    def gather(self, label: str, value: Any) -> list[Any]:
        values: list[str] = self._room.meet(self.layout.rank, json.dumps(value))
        return [json.loads(item) for item in values]

    def in_background(self, job: Callable[[], None]) -> None:
        """At once: nothing is gained by waiting, and only one thread runs at a time."""
        job()

    def beside(self, job: Callable[[Coordinator], None]) -> None:
        job(self)

    def open_mailbox(self) -> Mailbox:
        return _RoomMailbox(self._room, self.layout.particle)

    def close(self) -> None:
        self.abandon()


class _Done:
    def wait(self, *_: Any) -> None:
        pass


class _PeerGroup:
    """The collectives of a torch process group that the exchange uses."""

    def __init__(self, room: Room, me: int) -> None:
        self._room, self._me = room, me

    def allreduce(self, tensors: list[Tensor]) -> _Done:
        def add(values: list[Tensor]) -> Tensor:
            total = values[0].clone()
            for value in values[1:]:
                total += value
            return total

        tensors[0].copy_(self._room.meet(self._me, tensors[0], add))
        return _Done()

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Done:
        root = options.rootRank
        tensors[0].copy_(self._room.meet(self._me, tensors[0], lambda values: values[root].clone()))
        return _Done()

    def allgather(self, rows: list[list[Tensor]], mine: list[Tensor]) -> _Done:
        values = self._room.meet(self._me, mine[0], lambda values: [value.clone() for value in values])
        for row, value in zip(rows[0], values, strict=True):
            row.copy_(value)
        return _Done()

    def alltoall_base(self, output: Tensor, given: Tensor, _: Sequence[int], splits: Sequence[int]) -> _Done:
        def deal(values: list[tuple[Tensor, ...]]) -> list[Tensor]:
            return [torch.cat([parts[i] for parts in values]) for i in range(len(values))]

        output.copy_(self._room.meet(self._me, given.split(list(splits)), deal)[self._me])
        return _Done()


class _RoomMailbox(Mailbox):
    """Messages arrive at once; the others then go on to their own next sync point."""

    def __init__(self, room: Room, particle: int) -> None:
        room.mailboxes[particle] += 1  # an earlier one was for another training
        self._room, self._number, self._me = room, room.mailboxes[particle], particle

    def busy(self, peer: int) -> bool:
        return False

    def send(self, tensors: Sequence[Tensor], index: int, peer: int) -> None:
        flat = torch.cat([t.detach().to("cpu", torch.float32).view(-1) for t in tensors])
        address = (self._number, peer)
        self._room.message_bytes[address] += 4 * flat.numel()
        there = self._room.messages.get(address)
        if there is None or index >= there.index:
            self._room.messages[address] = Message(self._me, index, flat)
        self._room.pause(self._me)

    def newest(self) -> Message | None:
        return self._room.messages.get((self._number, self._me))

    def drop(self, message: Message) -> None:
        if self.newest() is message:
            del self._room.messages[self._number, self._me]

    @property
    def bytes_received(self) -> int:
        return self._room.message_bytes[self._number, self._me]


class Simulation:
    """The threads of one simulation, all running the same function.

    The first runs alone until it asks to join; only then is the number of particles known.
    """

    _here: ClassVar[threading.local] = threading.local()

    def __init__(self, body: Callable[[], Any]) -> None:
        self._body = body
        self._room: Room | None = None
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
        """What the function returned to each particle.

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
        if self._room is not None:
            self._room.enter(particle)
        set_process_state(self._state)
        try:
            self._results[particle] = self._body()
        except BaseException as error:
            self._errors.append(error)
            self._stop()
        finally:
            if self._room is not None:
                self._room.leave(particle)

    def _stop(self) -> None:
        self._stopped = True
        if self._room is not None:
            self._room.stop()

    def _join(self, particle: int, particles: int | Literal["node"], timeout_s: float) -> World:
        if particles == "node":
            raise ConfigError('swarm.particles = "node": a simulation has no nodes; give a number')
        if self._stopped:
            raise PeerError(f"particle {particle}: the simulation was stopped")
        if self._room is None:
            self._room = Room(particles)
            for other in range(1, particles):
                self._start(other)
        if particles != self._room.size:
            raise ConfigError(
                f"swarm.particles = {particles}: this simulation began with {self._room.size}; use one number"
            )
        return SimulatedWorld(self._room, particle, timeout_s)


_process: World | None = None  # kept: it hosts the store of torch's world


def _be_a_world_of_one() -> None:
    """DeepSpeed's world is this process, from now on; it cannot be built a second time."""
    global _process
    if _process is not None:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a simulation is one process; start it with python, not with a launcher of several ranks")
    _process = World.carve(1)
