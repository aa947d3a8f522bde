"""SIGTERM to any rank, at any time: all ranks stop at the same step, and what was saved there goes on bit for bit."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from variants import slow_but

from ds_pso import PeerError
from ds_pso.distributed import preemption

from .jobs import Case, assert_equal, swarm_of, train, working_weights

STEPS = 400  # more than any of these takes
CASE = Case(sync_mode="diloco", interval=4, swarm={"timeout_s": 20})


def train_until_asked(case: Case, folder: Path, signalled: dict[int, int], seconds: list[float]) -> tuple[int, int]:
    """Where this rank stopped, and where it was when it learned that it should.

    Args:
        signalled: the step after which a rank gets the signal.
        seconds: that a step takes, of each particle.
    """
    before = signal.getsignal(signal.SIGTERM)
    with swarm_of(case) as (swarm, engine):
        assert not swarm.should_stop()
        told = -1
        for step in range(1, STEPS):
            train(case, engine, range(step - 1, step))
            time.sleep(seconds[swarm.particle])
            if step == signalled.get(swarm.world.layout.rank):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # launchers may send it twice
            if told < 0 and swarm._preemption._promised:
                told = step
            if swarm.should_stop():
                break
        assert swarm.should_stop()
        swarm.save(folder)
    assert signal.getsignal(signal.SIGTERM) == before
    return engine.global_steps, told


def finish(case: Case, folder: Path | None, steps: int) -> Any:
    with swarm_of(case) as (swarm, engine):
        first = swarm.load(folder) if folder else 0
        train(case, engine, range(first, steps))
        swarm.world.background.settle()
        return working_weights(engine)


@pytest.mark.parametrize(
    ("stage", "signalled"),
    slow_but([(3, {0: 5})], [(2, {2: 5}), (3, {0: 5}), (0, {rank: 5 + rank for rank in range(4)})]),
    ids=["a rank of particle 1", "the leader", "all, one after another"],
)
def test_all_ranks_stop_at_one_step(pool: Pool, tmp_path: Path, stage: int, signalled: dict[int, int]) -> None:
    case = replace(CASE, stage=stage)
    found = pool.run(train_until_asked, case, tmp_path, signalled, [0.02, 0.02])
    ((stopped, _),) = {(step, 0) for step, _ in found}
    assert 5 <= stopped < 5 + 60, "not within about a second"
    steps = stopped + 3
    for mine, truth in zip(
        pool.run(finish, replace(case, seed=1), tmp_path, steps), pool.run(finish, case, None, steps), strict=True
    ):
        assert_equal(mine, truth)


def test_particles_that_are_apart_stop_where_the_first_is(pool: Pool, tmp_path: Path) -> None:
    case = replace(CASE, interval=1000)
    found = pool.run(train_until_asked, case, tmp_path, {3: 8}, [0.005, 0.05])
    ((stopped, _),) = {(step, 0) for step, _ in found}
    fast, slow = found[0][1], found[3][1]
    assert slow < fast - 10, "they were not apart"
    assert fast <= stopped <= fast + 1


def one_alone(case: Case) -> tuple[bool, bool]:
    with swarm_of(case) as (swarm, engine):
        before = swarm.should_stop()
        train(case, engine, range(1))
        os.kill(os.getpid(), signal.SIGTERM)
        return before, swarm.should_stop()


def test_a_world_of_one(pool: Pool) -> None:
    assert pool.run(one_alone, Case(particles=1), world_size=1) == [(False, True)]


def one_has_left(case: Case) -> str:
    preemption._PATIENCE_S = 1.0
    with swarm_of(case) as (swarm, _):
        swarm.should_stop()
        swarm.world.coordinator.gather("ready", None)
        rank = swarm.world.layout.rank
        if rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # in a collective, with the one that is gone
        time.sleep(1.0)
        swarm.engine.global_steps += 1  # as if the step had needed nobody
        try:
            swarm.should_stop()
        except PeerError as error:
            time.sleep(1)
            return str(error)
        return "nothing"


@pytest.mark.slow
def test_it_is_an_ordinary_signal_when_a_rank_is_lost(pool: Pool) -> None:
    """Launchers send it to the others when one has failed: they must not stay until SIGKILL."""
    outcomes = pool.outcomes(one_has_left, replace(CASE, swarm={"timeout_s": 3}), timeout=30)
    assert [outcome.kind for outcome in outcomes] == [None, "Killed", None, "Killed"]
    for rank in (0, 2):
        assert "particle 1, rank 1 (rank 3" in outcomes[rank].value
