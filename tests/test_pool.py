"""The pool itself: results by rank, errors with their text, and a hang that ends alone."""

from __future__ import annotations

import os
import signal
import time

import pytest
from pool import JobError, Pool


def who_am_i(greeting: str) -> tuple[str, int, str]:
    return greeting, int(os.environ["RANK"]), os.environ["WORLD_SIZE"]


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")


def hang_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(1000)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_the_order_of_ranks(pool: Pool) -> None:
    assert pool.run(who_am_i, "hello", world_size=3) == [("hello", rank, "3") for rank in range(3)]


def test_an_error_names_the_rank_the_type_and_the_text(pool: Pool) -> None:
    with pytest.raises(JobError, match=r"rank 1: ValueError: rank one is unwell"):
        pool.run(fail_on_rank_one, world_size=2)


def test_a_hang_shows_the_stack_and_the_next_job_runs(pool: Pool) -> None:
    with pytest.raises(JobError, match=r"(?s)ranks \[0\] were not done.*in hang_on_rank_zero"):
        pool.run(hang_on_rank_zero, world_size=2, timeout=2)
    assert len(pool.run(who_am_i, "again", world_size=2)) == 2


def test_a_killed_rank_is_reported(pool: Pool) -> None:
    assert [outcome.kind for outcome in pool.outcomes(die_on_rank_one, world_size=2)] == [None, "Killed"]
