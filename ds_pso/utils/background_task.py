"""Jobs that go on while training does."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

import torch

_LOOK_S = 0.1


class Task:
    """A job in a thread of its own, behind what the device has been given to do so far."""

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
        """True inside the job."""
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        """True until it is done."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until it is done, or the time is over; raise nothing."""
        self._thread.join(timeout_s)

    def wait(self, until: threading.Event | None = None) -> None:
        """Wait until it is done, or has set the event; raise what it raised."""
        if until is None:
            self._thread.join()
        else:
            while self._thread.is_alive() and not until.wait(_LOOK_S):
                pass  # it may have ended by an error, and then sets nothing any more
        if self._error is not None:
            raise self._error


class Background:
    """The one job that goes on beside training, such as an overlapped sync; at most one at a time.

    Args:
        inline: do each job at once, in the caller's thread, where nothing is gained by waiting.

    Attributes:
        task: the job; None: there is none, or it is over and known to be.
        settled_s: seconds for which callers have waited for such jobs so far.
    """

    def __init__(self, *, inline: bool = False) -> None:
        self._inline = inline
        self.task: Task | None = None
        self.settled_s = 0.0

    def run(self, job: Callable[[], None]) -> None:
        """Start a job, when the last one is over. Called alike on all ranks: it talks to peers."""
        self.settle()
        if self._inline:
            job()
        else:
            self.task = Task(job)

    def settle(self) -> None:
        """Wait until nothing goes on; raise what the job raised. The job itself does not wait for itself."""
        if self.task is not None and not self.task.is_mine:
            self.wait()
            self.task = None

    def wait(self, until: threading.Event | None = None) -> None:
        """Wait until the job is over, or has set the event; raise what it raised."""
        if self.task is not None and not self.task.is_mine:
            begin = time.perf_counter()
            self.task.wait(until)
            self.settled_s += time.perf_counter() - begin

    def forget(self) -> None:
        """Forget the job: what it raised is known."""
        self.task = None


class Writer:
    """The checkpoint that is being written beside training: at most one."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def follow(self, task: Task | None) -> None:
        """Remember the task that writes; None: it is written already."""
        self._task = task

    def wait(self) -> None:
        """Wait until it is complete; raise what it raised, once."""
        task, self._task = self._task, None
        if task is not None:
            task.wait()


@functools.cache
def _stream_of_jobs(device: int) -> torch.cuda.Stream:
    """Return the stream of all jobs on a GPU: torch's allocator keeps memory apart for each stream that is used."""
    return torch.cuda.Stream(device)


def _same_device() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """For another thread: this thread's GPU, and a stream that goes on behind what the present one was given."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return contextlib.nullcontext
    device, before = torch.cuda.current_device(), torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        torch.cuda.set_device(device)
        stream = _stream_of_jobs(device)
        with torch.cuda.stream(stream):
            stream.wait_event(before)
            yield
        stream.synchronize()

    return enter
