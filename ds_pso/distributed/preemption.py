"""SIGTERM, Ctrl-C or a hang-up as a request to stop, which all ranks grant at the same step.

A rank that gets the signal tells the others through the store. Beside training, a thread of every rank looks there
now and then; when it finds the request, it tells the others the last step at which its rank has said to go on, and
that step plus one, over the slowest answer, is where all stop: the first step that nobody has passed. Meanwhile a
rank that comes to a later step waits for that number, and only for the threads of others, not for their training.
So nothing is exchanged until somebody gets the signal, and particles that have drifted apart stop at the step of
the one that is ahead.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading

from ds_pso.distributed.coordinator import Coordinator
from ds_pso.distributed.ending_signals import EndingSignals
from ds_pso.errors import PeerError, SwarmError

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75: nothing is wrong, and the same command with --resume goes on
_LOOK_S = 0.2
_PATIENCE_S = 10.0  # for the threads of the others; launchers kill 30 s after SIGTERM


class Preemption:
    """Made on all ranks at ``step``; from then on these signals end this process after a later step, not at once."""

    def __init__(self, coordinator: Coordinator, step: int) -> None:
        self._me = coordinator.layout.rank
        self._coordinator = coordinator.second_connection(min(_PATIENCE_S, coordinator.timeout_s))
        self._changed = threading.Condition()
        self._last = step  # the last step at which ``due`` has said no
        self._promised = False  # to say it at no later one before the target is known
        self._target: int | None = None
        self._error: SwarmError | None = None
        self._over = threading.Event()
        # A simulated particle is a thread, and the process is not its own.
        is_alone = threading.current_thread() is threading.main_thread()
        self._signals = EndingSignals(says_so=coordinator.is_leader) if is_alone else None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ds_pso preemption")
        if self._coordinator.store is not None:
            self._thread.start()
        atexit.register(self.close)  # no thread may be inside a store while the interpreter goes down

    def due(self, step: int) -> bool:
        """Return whether to save and stop after ``step``; the same on all ranks. Called once a step.

        Raises:
            PeerError: the signal came, and a rank did not answer in time.
        """
        if self._coordinator.store is None:
            return self._signalled is not None
        with self._changed:
            if step > self._last and self._promised:
                self._changed.wait_for(lambda: self._target is not None or self._error is not None)
            if self._error is not None:
                raise self._error
            if self._target is not None:
                return step >= self._target
            self._last = max(step, self._last)
            return False

    @property
    def _signalled(self) -> int | None:
        """The signal that this rank has got."""
        return self._signals.first() if self._signals else None

    def close(self) -> None:
        """Let the signals do again what they did before."""
        atexit.unregister(self.close)
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_LOOK_S * 5)
        if self._signals is not None:
            self._signals.close()

    def _watch(self) -> None:
        store = self._coordinator.store
        assert store is not None
        try:
            while self._signalled is None and not store.check(["stop"]):
                if self._over.wait(_LOOK_S):
                    return
            store.set("stop", str(self._me))
            with self._changed:
                self._promised, last = True, self._last
            target = max(self._coordinator.gather("the step at which to stop", last)) + 1
            with self._changed:
                self._target = target
                self._changed.notify_all()
        except Exception as error:  # the store of rank 0 is gone, or a rank is
            if self._over.is_set():
                return
            with self._changed:
                self._error = error if isinstance(error, SwarmError) else PeerError(_lost(error))
                self._changed.notify_all()
            sign = self._signalled
            if sign is not None:  # the others cannot save, so this is an ordinary signal
                with contextlib.suppress(OSError):
                    print(f"ds_pso: error: {self._error}", file=sys.stderr, flush=True)
                os._exit(128 + sign)


def _lost(error: Exception) -> str:
    return (
        f"the store of rank 0 no longer answers, so no step to stop at can be agreed on ({type(error).__name__}); "
        "rank 0 was lost or has ended: look for its error above, then restart from the last checkpoint"
    )
