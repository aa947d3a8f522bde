"""The signals that ask a process to end: noted while they are to wait, and a second Ctrl-C, which does not.

Python runs handlers in the main thread, and not while that is inside a collective. So a thread reads what the
interpreter writes down at once (``signal.set_wakeup_fd``): a second Ctrl-C ends a process that hangs, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import threading
import time
import weakref
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Ctrl-C comes from the terminal to every process, and within this time from launchers to their ranks once more.
_ECHO_S = 1.0
_CLOSE = b"\0"

_active: weakref.WeakSet[EndingSignals] = weakref.WeakSet()


class EndingSignals:
    """Made in the main thread; from then on SIGTERM, SIGINT and SIGHUP do nothing but set ``first``, until ``close``.

    A signal that is ignored, such as SIGHUP under ``nohup``, stays so. A second Ctrl-C ends the process.

    Args:
        says_so: whether to print what Ctrl-C does now.
    """

    def __init__(self, *, says_so: bool = False) -> None:
        self._says_so = says_so
        self._first: int | None = None
        self._interrupted_s: float | None = None  # when the first Ctrl-C came
        # After Ctrl-C, deepspeed sends SIGTERM to one rank after another; torchrun does at a second Ctrl-C.
        self._insisting = {signal.SIGINT, *([signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else [])}
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.before = {
            sign: signal.signal(sign, self._handle)
            for sign in SIGNALS
            if sign is signal.SIGTERM or signal.getsignal(sign) is not signal.SIG_IGN
        }
        other = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._reads = other == -1
        if not self._reads:  # of an event loop, which would hear of no signal any more
            signal.set_wakeup_fd(other)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ds_pso signals")
        self._thread.start()
        _active.add(self)

    def first(self) -> int | None:
        """Return the first signal that has come; None: none has."""
        self._read()
        return self._first

    def close(self) -> None:
        """Let the signals do again what they did before."""
        if self not in _active or threading.current_thread() is not threading.main_thread():
            return
        _active.discard(self)
        if self._reads:
            signal.set_wakeup_fd(-1)
        for sign, handler in self.before.items():
            signal.signal(sign, handler)
        self._writer.send(_CLOSE)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _handle(self, sign: int, _: FrameType | None) -> None:
        if self._first is None or not self._reads:  # None: an event loop may have taken the wake-up since
            self._take(sign)

    def _watch(self) -> None:
        while True:
            select.select([self._reader], [], [])
            if self._read():
                return

    def _read(self) -> bool:
        """Take note of what has come; returns true at the end."""
        with self._lock, contextlib.suppress(OSError):
            signs = self._reader.recv(64)
            for sign in signs:
                if sign in self.before:
                    self._take(sign)
            return 0 in signs
        return False

    def _take(self, sign: int) -> None:
        now, before = time.monotonic(), self._interrupted_s
        if self._first is None:
            self._first = sign
        if sign == signal.SIGHUP:
            _let_go_of_terminal()
        if sign in self._insisting and before is not None and now - before > _ECHO_S:
            _say("ended at once, as Ctrl-C came a second time")
            os._exit(128 + signal.SIGINT)
        if sign == signal.SIGINT and before is None:
            self._interrupted_s = now
            if self._says_so:
                _say("Ctrl-C: training stops after the next step that all ranks can reach; once more ends it at once")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"ds_pso: {text}\n".encode())


def _let_go_of_terminal() -> None:
    """Write no more to a terminal that has gone: an error there would come before the checkpoint."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
        os.close(nowhere)


def _forget_in_child() -> None:
    """After a fork the signals of a child, such as a worker of a DataLoader, are not those of this rank."""
    for signals in list(_active):
        signal.set_wakeup_fd(-1)
        for sign, handler in signals.before.items():
            # Ctrl-C comes from the terminal to workers, too, and they are needed until the step is done.
            signal.signal(sign, handler if sign is signal.SIGTERM else signal.SIG_IGN)
    _active.clear()


os.register_at_fork(after_in_child=_forget_in_child)
