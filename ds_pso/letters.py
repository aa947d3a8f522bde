"""Letters between particles that wait for nobody: the newest state of a peer, whenever it comes."""

from __future__ import annotations

import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Letter:
    """What a peer sent."""

    sender: int  # particle
    index: int  # how many sync points the sender had behind it
    tensors: list[Tensor]  # fp32, on the CPU

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Mailbox(ABC):
    """Sends copies of tensors to one peer after the other, and holds the newest letter that came."""

    def __init__(self, particle: int, num_particles: int) -> None:
        self.particle = particle
        self.num_particles = num_particles
        self._next = 0  # of the peers in turn

    def _peers_in_turn(self) -> list[int]:
        """All peers, beginning with the one whose turn it is."""
        others = self.num_particles - 1
        return [(self.particle + 1 + (self._next + k) % others) % self.num_particles for k in range(others)]

    @abstractmethod
    def send(self, tensors: Sequence[Tensor], index: int) -> None:
        """Send copies to the next peer. Returns at once."""

    @abstractmethod
    def take(self, sizes: Sequence[int]) -> Letter | None:
        """The newest letter, cut into flat tensors of these sizes; None if none came since the last call."""

    def close(self) -> None:  # noqa: B027
        """Tell the peers that no more will come."""


class GlooMailbox(Mailbox):
    """Two threads for each peer, one that sends and one that receives, on a process group of their own.

    A peer that is slow, stopped or dead holds up its own two threads and nobody else: while it has
    not taken the last letter, it is passed over. Memory: the letter that arrived last, one for each peer that
    is just sending, and one for each that is just being sent to.
    """

    def __init__(self, group: Any, particle: int, num_particles: int, chunk_bytes: int = 2**26) -> None:
        super().__init__(particle, num_particles)
        self._group = group
        self._chunk = chunk_bytes // 4
        self._lock = threading.Lock()
        self._newest: tuple[int, int, Tensor] | None = None
        self._outboxes: dict[int, queue.Queue[tuple[int, Tensor] | None]] = {}
        self._threads = []
        for peer in range(num_particles):
            if peer != particle:
                self._outboxes[peer] = queue.Queue(maxsize=1)
                self._threads += [threading.Thread(target=self._deliver, args=(peer,), daemon=True)]
                self._threads += [threading.Thread(target=self._collect, args=(peer,), daemon=True)]
        for thread in self._threads:
            thread.start()

    def send(self, tensors: Sequence[Tensor], index: int) -> None:
        for turn, peer in enumerate(self._peers_in_turn()):
            if self._outboxes[peer].empty():
                self._next += turn + 1
                self._outboxes[peer].put((index, torch.cat([t.detach().float().cpu().view(-1) for t in tensors])))
                return

    def take(self, sizes: Sequence[int]) -> Letter | None:
        with self._lock:
            newest, self._newest = self._newest, None
        if newest is None:
            return None
        sender, index, flat = newest
        return Letter(sender, index, list(flat.split(list(sizes))))

    def close(self) -> None:
        for outbox in self._outboxes.values():
            with contextlib.suppress(queue.Full):
                outbox.put_nowait(None)
        for thread in self._threads:
            thread.join(1.0)  # a thread whose peer is gone stays where it is

    def _deliver(self, peer: int) -> None:
        outbox = self._outboxes[peer]
        with contextlib.suppress(RuntimeError):  # the peer is gone
            while True:
                letter = outbox.get()
                index, flat = letter or (-1, torch.empty(0))
                self._group.send([torch.tensor([index, flat.numel()])], peer, 0).wait()
                if letter is None:
                    return
                for chunk in flat.split(self._chunk):
                    self._group.send([chunk], peer, 1).wait()
        outbox.put((0, torch.empty(0)))  # full from now on: passed over

    def _collect(self, peer: int) -> None:
        header = torch.empty(2, dtype=torch.int64)
        with contextlib.suppress(RuntimeError):  # the peer is gone
            while True:
                self._group.recv([header], peer, 0).wait()
                index, numel = header.tolist()
                if index < 0:
                    return
                flat = torch.empty(numel)
                for chunk in flat.split(self._chunk):
                    self._group.recv([chunk], peer, 1).wait()
                with self._lock:
                    self._newest = (peer, index, flat)
