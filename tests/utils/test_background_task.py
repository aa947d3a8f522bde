"""Jobs beside training: errors reach who waits; on a GPU they have a stream of their own, in the right order."""

from __future__ import annotations

import threading

import pytest
import torch

from ds_pso.utils.background_task import Background, Task
from ds_pso.utils.device import wait_for_device

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = 200_000_000  # cycles: about a tenth of a second


def test_who_waits_gets_what_the_job_has_raised() -> None:
    background = Background()
    background.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.settle()
    background.forget()
    background.settle()  # it is known, and not raised again


def test_a_job_that_fails_is_not_waited_for_in_vain() -> None:
    task = Task(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.wait(until=threading.Event())


def test_without_a_gpu_there_is_nothing_to_wait_for() -> None:
    wait_for_device()


@pytest.mark.gpu
@on_gpu
def test_a_job_begins_behind_what_the_device_was_given() -> None:
    x = torch.zeros(1000, device="cuda")
    torch.cuda._sleep(LONG)
    x.fill_(1)
    seen: list[float] = []
    Task(lambda: seen.append(x.sum().item())).wait()
    assert seen == [1000.0]


@pytest.mark.gpu
@on_gpu
def test_all_jobs_share_a_stream_that_is_not_that_of_training() -> None:
    torch.zeros(1, device="cuda")
    streams: list[torch.cuda.Stream] = []
    for _ in range(3):
        Task(lambda: streams.append(torch.cuda.current_stream())).wait()
    assert streams[0] == streams[1] == streams[2] != torch.cuda.current_stream()


@pytest.mark.gpu
@on_gpu
def test_a_job_is_over_when_the_device_is_done_with_it() -> None:
    torch.zeros(1, device="cuda")
    done = torch.cuda.Event()

    def job() -> None:
        torch.cuda._sleep(LONG)
        done.record()

    Task(job).wait()
    assert done.query()


@pytest.mark.gpu
@on_gpu
def test_waiting_for_the_device_waits_for_this_threads_stream_alone() -> None:
    torch.zeros(1, device="cuda")
    other, mine, theirs = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
    with torch.cuda.stream(other):
        torch.cuda._sleep(20 * LONG)
        theirs.record()
    torch.cuda._sleep(LONG)
    mine.record()
    wait_for_device()
    assert mine.query()
    assert not theirs.query()
