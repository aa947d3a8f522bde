"""Messages between particles that wait for nobody: the newest state of a peer, whenever it comes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ds_pso.utils.checksums import checksum, sealed, unsealed

log = logging.getLogger(__name__)

_FOR_EVER = timedelta(days=3650)  # only threads that nobody waits for wait so long
_CLOSE_S = 2.0
_CLOSING = -1  # in place of an index


@dataclass(frozen=True)
class Message:
    """State of a peer, as it was when it was sent."""

    sender: int  # particle
    index: int  # how many sync points the sender had behind it
    flat: Tensor  # fp32, on the CPU


class Mailbox(ABC):
    """Sends copies of tensors to peers, and holds the newest message that came."""

    @abstractmethod
    def busy(self, peer: int) -> bool:
        """True while the last message to this peer is on its way."""

    @abstractmethod
    def send(self, tensors: Sequence[Tensor], index: int, peer: int) -> None:
        """Send copies to a peer that is not busy. Returns at once."""

    @abstractmethod
    def newest(self) -> Message | None:
        """Return the message with the highest index of those that have come since the last one was dropped."""

    @abstractmethod
    def drop(self, message: Message) -> None:
        """Forget this message, if it still is the newest."""

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes of all messages that have come so far."""

    def close(self) -> None:  # noqa: B027
        """Send and receive no more."""


class GlooMailbox(Mailbox):
    """Two threads for each peer, one that sends and one that receives, on a process group of their own.

    A peer that is slow, stopped or dead holds up its own two threads and nobody else. A message that was damaged on
    the way is as good as one that never came. Memory: the newest
    message, one for each peer that is just sending, and one for each that is just being sent to.

    Args:
        group: of all the particles, used by nobody else.
    """

    def __init__(self, group: Any, particle: int, num_particles: int, chunk_bytes: int = 2**26) -> None:
        self._group = group
        self._chunk = chunk_bytes // 4
        self._changed = threading.Condition()
        self._newest: Message | None = None
        self._outgoing: dict[int, tuple[int, Tensor]] = {}  # by peer: index, and what is to be sent or on its way
        self._received = 0
        self._closed = False
        peers = [peer for peer in range(num_particles) if peer != particle]
        self._threads = [
            threading.Thread(target=target, args=(peer,), daemon=True)
            for peer in peers
            for target in (self._deliver, self._collect)
        ]
        for thread in self._threads:
            thread.start()

    def busy(self, peer: int) -> bool:
        with self._changed:
            return peer in self._outgoing

    def send(self, tensors: Sequence[Tensor], index: int, peer: int) -> None:
        flat = torch.empty(sum(t.numel() for t in tensors))
        for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
            part.copy_(tensor.view(-1))
        with self._changed:
            self._outgoing[peer] = (index, flat)
            self._changed.notify_all()

    def newest(self) -> Message | None:
        with self._changed:
            return self._newest

    def drop(self, message: Message) -> None:
        with self._changed:
            if self._newest is message:
                self._newest = None

    @property
    def bytes_received(self) -> int:
        with self._changed:
            return self._received

    def close(self) -> None:
        """Tell the peers; then wait a little for the threads: one whose peer is gone or silent stays where it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @contextlib.contextmanager
    def _until_it_is_gone(self, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self._closed:
                log.info("no messages any more with particle %d: %s", peer, str(error).splitlines()[0])

    def _deliver(self, peer: int) -> None:
        with self._until_it_is_gone(peer):  # then it is busy for ever
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or peer in self._outgoing)
                    index, flat = (_CLOSING, torch.empty(0)) if self._closed else self._outgoing[peer]
                header = sealed([index, flat.numel(), checksum(flat)])
                self._group.send([torch.tensor(header)], peer, 0).wait(_FOR_EVER)
                if index == _CLOSING:
                    return
                for chunk in flat.split(self._chunk):
                    self._group.send([chunk], peer, 1).wait(_FOR_EVER)
                del flat, chunk  # not to be kept until the next message
                with self._changed:
                    del self._outgoing[peer]

    def _collect(self, peer: int) -> None:
        header = torch.tensor(sealed([0, 0, 0]))
        with self._until_it_is_gone(peer):
            while not self._closed:
                self._group.recv([header], peer, 0).wait(_FOR_EVER)
                known = unsealed(header.tolist())
                if known is None:
                    log.warning("a header from particle %d was damaged: nothing more is read from it", peer)
                    return  # nobody could say where the next message begins
                if known[0] == _CLOSING:
                    return
                index, numel, expected = known
                flat = torch.empty(numel)
                for chunk in flat.split(self._chunk):
                    self._group.recv([chunk], peer, 1).wait(_FOR_EVER)
                intact = checksum(flat) == expected
                with self._changed:
                    self._received += 4 * numel
                    if intact and (self._newest is None or index >= self._newest.index):
                        self._newest = Message(peer, index, flat)
                del flat, chunk
