"""A job that goes on while training does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

_LOOK_S = 0.1


class Task:
    """Runs ``job`` in a thread of its own, behind what the device has been given to do so far."""

    def __init__(self, job: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        enter = _same_device()

        def run() -> None:
            try:
                with enter():
                    job()
            except BaseException as error:
                self._error = error

        # A daemon: whoever leaves because of an error must not wait for peers that are gone.
        self._thread = threading.Thread(target=run, daemon=True, name="ds_pso exchange")
        self._thread.start()

    @property
    def is_mine(self) -> bool:
        """Whether the caller is the job."""
        return threading.current_thread() is self._thread

    def wait(self, until: threading.Event | None = None) -> None:
        """Until it is done, or has set the event; raises what it raised."""
        if until is None:
            self._thread.join()
        else:
            while self._thread.is_alive() and not until.wait(_LOOK_S):
                pass  # it may have ended by an error, and then sets nothing any more
        if self._error is not None:
            raise self._error


class Writer:
    """The checkpoint that is being written beside training: at most one."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def follow(self, task: Task | None) -> None:
        self._task = task

    def wait(self) -> None:
        """Until it is complete; raises what it raised, once."""
        task, self._task = self._task, None
        if task is not None:
            task.wait()


def _same_device() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """For another thread: this thread's GPU, and a stream that begins where the present one is."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return contextlib.nullcontext
    device, before = torch.cuda.current_device(), torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(before)
            yield
        stream.synchronize()

    return enter
