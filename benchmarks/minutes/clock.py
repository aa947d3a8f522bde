"""Training by the clock: the learning rate, and one clock for both ends."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WARMUP, DECAY = 0.05, 0.2  # parts of the time
_MAX_STEPS = 1 << 20
_SLOT = 8  # bytes of a float
_READY, _ORIGIN, _DONE, _FIRST_STEP = range(4)  # slots
_TIMEOUT_S = 300.0


def rate_factor(elapsed: float) -> float:
    """What the learning rate is multiplied by, from 0 to 1: warm up, hold, decay linearly at the end.

    Called WSD elsewhere: S. Hu et al., "MiniCPM", arXiv 2404.06395, section 4; here in time, not in steps.

    Args:
        elapsed: part of the time that is over; 0 at the beginning, 1 at the end.
    """
    if elapsed < WARMUP:
        return elapsed / WARMUP
    return min(1.0, max(0.0, (1 - elapsed) / DECAY))


class SharedClock:
    """One clock for processes of one machine: for all of them a step begins when the first of them comes to it.

    So all have the same learning rate at each step, take as many steps, and say nothing about it over the link that is
    measured. Machines of their own would broadcast the time, 8 bytes.

    Args:
        path: a file, the same for all; made by the first.
        num_ends: processes.
    """

    def __init__(self, path: Path, num_ends: int) -> None:
        self._num_ends = num_ends
        self._file = path.open("a+b")
        os.ftruncate(self._file.fileno(), _SLOT * (_FIRST_STEP + _MAX_STEPS))  # zeros; sparse
        self._slots = mmap.mmap(self._file.fileno(), 0)

    def start(self) -> None:
        """Wait until all are ready; then time begins.

        Raises:
            TimeoutError: somebody did not come.
        """
        with self._locked():
            self._add_one(_READY)
            if self._get(_READY) == self._num_ends:
                self._set(_ORIGIN, time.monotonic())
        self._wait_for(_READY)

    def elapsed(self, step: int) -> float:
        """Seconds from the start until the first end came to this step."""
        with self._locked():
            if not self._get(_FIRST_STEP + step):
                self._set(_FIRST_STEP + step, time.monotonic() - self._get(_ORIGIN))
            return self._get(_FIRST_STEP + step)

    def finish(self) -> None:
        """Wait until all are done: who leaves earlier takes its connections with it.

        Raises:
            TimeoutError: somebody did not come.
        """
        with self._locked():
            self._add_one(_DONE)
        self._wait_for(_DONE)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _wait_for(self, slot: int) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while self._get(slot) < self._num_ends:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._get(slot):.0f} of {self._num_ends} ends came within {_TIMEOUT_S:.0f} s")
            time.sleep(0.001)

    def _add_one(self, slot: int) -> None:
        self._set(slot, self._get(slot) + 1)

    def _get(self, slot: int) -> float:
        return float(struct.unpack_from("d", self._slots, _SLOT * slot)[0])

    def _set(self, slot: int, value: float) -> None:
        struct.pack_into("d", self._slots, _SLOT * slot, value)
