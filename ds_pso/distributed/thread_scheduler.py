"""Threads that take turns: one runs at a time, and what a process has one of is then its own."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ds_pso.distributed.mailbox import Message
from ds_pso.errors import PeerError


class ThreadScheduler:
    """P threads, of which one has the turn and runs; the others wait for theirs at an exchange or a pause."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mailboxes: Counter[int] = Counter()  # that each particle has opened
        self.messages: dict[tuple[int, int], Message] = {}  # the newest, by mailbox and addressee
        self.message_bytes: Counter[tuple[int, int]] = Counter()  # of all, likewise
        self._turn = threading.Condition()
        self._running = 0
        self._waiting: dict[int, Any] = {}  # what those brought who wait for an exchange to be complete
        self._gone: set[int] = set()
        self._stopped = False
        self._completed = 0  # that were completed
        self._result: Any = None

    def exchange(self, me: int, value: Any, combine: Callable[[list[Any]], Any] = list) -> Any:
        """Return ``combine`` of the values of all, in the order of particles; made once and shared.

        Raises:
            PeerError: another particle has ended, so the exchange will never be complete.
        """
        with self._turn:
            self._waiting[me] = value
            if len(self._waiting) == self.size:
                self._result = combine([self._waiting[i] for i in range(self.size)])
                self._completed += 1
                self._waiting.clear()
                return self._result
            completed = self._completed
            self._hand_over(me)
            if self._stopped:
                raise PeerError(f"particle {me}: the simulation was stopped")
            if self._completed == completed:
                raise PeerError(
                    f"particle {me} waits for particles {sorted(self._gone)}, which have ended; "
                    "all must reach the same sync points"
                )
            return self._result

    def pause(self, me: int) -> None:
        """Let the others run up to their next exchange or pause.

        Raises:
            PeerError: the simulation has been stopped.
        """
        with self._turn:
            self._hand_over(me)
            if self._stopped:
                raise PeerError(f"particle {me}: the simulation was stopped")

    def stop(self) -> None:
        """Let every thread end at its next exchange or pause."""
        with self._turn:
            self._stopped = True

    def enter(self, me: int) -> None:
        """Called first in each thread."""
        with self._turn:
            self._turn.wait_for(lambda: self._running == me)

    def leave(self, me: int) -> None:
        """Called last in each thread."""
        with self._turn:
            self._gone.add(me)
            self._pass_on(me)

    def _hand_over(self, me: int) -> None:
        saved = process_state()
        self._pass_on(me)
        self._turn.wait_for(lambda: self._running == me)
        set_process_state(saved)

    def _pass_on(self, me: int) -> None:
        order = [(me + 1 + k) % self.size for k in range(self.size)]
        there = [i for i in order if i not in self._gone]
        # If all who are left wait for somebody who is gone, they must hear of it.
        self._running = next((i for i in there if i not in self._waiting), there[0] if there else -1)
        if self._running in self._waiting:
            del self._waiting[self._running]
        self._turn.notify_all()


def process_state() -> tuple[Any, ...]:
    """Return what a process has one of, and each particle shall have for itself: random numbers, the main module."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, sys.modules["__main__"]


def set_process_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda, sys.modules["__main__"] = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
