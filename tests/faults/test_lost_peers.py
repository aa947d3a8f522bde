"""A rank that is late, stopped, killed or never came: the others say who, within the timeout.

The time limit of each job is the proof that nobody hangs.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from integration.jobs import Case, config, place, swarm_of, train
from pool import Outcome, Pool

import ds_pso

TIMEOUT_S = 3
CASE = Case(swarm={"timeout_s": TIMEOUT_S})
LIMIT_S = 40.0
RANKS = {
    0: "particle 0, rank 0 (rank 0",
    1: "particle 0, rank 1 (rank 1",
    2: "particle 1, rank 0 (rank 2",
    3: "particle 1, rank 1 (rank 3",
}


def leave(how: str) -> None:
    """What befalls the lost rank."""
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raised":
        raise ValueError("something else went wrong")
    time.sleep(1000)  # "asleep"


def lose_before_start(case: Case, lost: int, how: str) -> None:
    if int(os.environ["RANK"]) == lost:
        leave(how)
    with ds_pso.init(config(case, place(case)[2])):
        pass


def lose_while_training(case: Case, lost: int, how: str) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(2))
        if swarm.world.layout.rank == lost:
            leave(how)
        # Straight to the sync point: in a step of its own the particle would wait inside DeepSpeed.
        swarm.sync()


def lose_while_gathering(case: Case, lost: int, how: str) -> Any:
    with swarm_of(case) as (swarm, _):
        if swarm.world.layout.rank == lost:
            leave(how)
        swarm.total_bytes()


def lose_in_the_exchange(case: Case, lost: int, how: str) -> Any:
    """After the barrier: the lost rank has said that it is there."""
    with swarm_of(case) as (swarm, _):
        if swarm.world.layout.rank == lost:
            swarm.session.exchange.weighted_mean = lambda *_: leave(how)
        swarm.sync()


def lose_in_the_background(case: Case, lost: int, how: str) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(1))
        if swarm.world.layout.rank == lost:
            leave(how)
        swarm.session.synchronizer.overlap.begin(swarm.session.window, step=1)
        swarm.session.synchronizer.overlap.advance(swarm.session.window, step=2)


def assert_named(outcomes: list[Outcome], lost: int, waiting: list[int]) -> None:
    for rank in waiting:
        assert outcomes[rank].kind == "PeerError", outcomes[rank]
        named = RANKS[lost] in outcomes[rank].text
        store_gone = lost == 0 and "rank 0 was lost or hangs" in outcomes[rank].text
        assert named or store_gone, outcomes[rank].text


@pytest.mark.parametrize("lost", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_that_never_starts(pool: Pool, lost: int) -> None:
    outcomes = pool.outcomes(lose_before_start, CASE, lost, "asleep", timeout=LIMIT_S, silent=(lost,))
    others = [rank for rank in range(4) if rank != lost]
    for rank in others:
        assert outcomes[rank].kind == "PeerError", outcomes[rank]
        expected = "could not reach rank 0" if lost == 0 else RANKS[lost]
        assert expected in outcomes[rank].text


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        *[(3, "killed"), (0, "raised")],
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in [(0, "stopped"), (3, "stopped"), (0, "killed"), (3, "raised")]
        ),
    ],
)
def test_a_peer_lost_before_a_sync_point(pool: Pool, lost: int, how: str) -> None:
    silent = (lost,) if how == "stopped" else ()
    outcomes = pool.outcomes(lose_while_training, CASE, lost, how, timeout=LIMIT_S, silent=silent)
    assert_named(outcomes, lost, [(lost + 2) % 4, lost ^ 1])  # its peer and its local rank
    assert outcomes[3 - lost].kind is not None  # who has no business with it ends too, when the others leave


@pytest.mark.parametrize(
    ("lost", "how"),
    [pytest.param(lost, how, marks=pytest.mark.slow) for lost in (0, 2) for how in ("stopped", "killed")],
)
def test_a_rank_lost_before_a_gathering_of_all(pool: Pool, lost: int, how: str) -> None:
    silent = (lost,) if how == "stopped" else ()
    outcomes = pool.outcomes(lose_while_gathering, CASE, lost, how, timeout=LIMIT_S, silent=silent)
    assert_named(outcomes, lost, [rank for rank in range(4) if rank != lost])


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        (3, "stopped"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in [(0, "stopped"), (0, "killed"), (3, "killed")]),
    ],
)
def test_a_peer_lost_in_the_middle_of_an_exchange(pool: Pool, lost: int, how: str) -> None:
    # The local rank of a frozen rank waits inside DeepSpeed's own collective, for as long as DeepSpeed likes.
    silent = (lost, lost ^ 1) if how == "stopped" else ()
    outcomes = pool.outcomes(lose_in_the_exchange, CASE, lost, how, timeout=LIMIT_S, silent=silent)
    assert_named(outcomes, lost, [(lost + 2) % 4])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_peer_lost_before_a_sync_point_in_the_background(pool: Pool, how: str) -> None:
    lost, silent = 3, (3,) if how == "stopped" else ()
    outcomes = pool.outcomes(lose_in_the_background, CASE, lost, how, timeout=LIMIT_S, silent=silent)
    assert_named(outcomes, lost, [1, 2])  # its peer, when it asks for the result, and its local rank


def lose_between_plans(case: Case, lost: int, how: str, where: str) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(1))
        if swarm.particle == lost:
            setattr(
                swarm.session.synchronizer.parts.assessor if where == "score" else swarm.session.exchange,
                where,
                lambda *_: leave(how),
            )
        swarm.sync()


RING = Case(sync_mode="pso", options={"topology": "ring"}, particles=4, interval=100, swarm=CASE.swarm)
GUARDED = Case(sync_mode="swarm", probe=True, options={"fitness_steps": 1}, particles=3, interval=100, swarm=CASE.swarm)


@pytest.mark.parametrize(
    ("case", "where", "how"),
    [(RING, "from_each", "killed"), pytest.param(GUARDED, "score", "stopped", marks=pytest.mark.slow)],
    ids=["ring", "score"],
)
def test_a_peer_lost_between_the_plans_of_a_sync_point(pool: Pool, case: Case, where: str, how: str) -> None:
    lost, size = 1, int(case.particles)
    silent = (lost,) if how == "stopped" else ()
    outcomes = pool.outcomes(
        lose_between_plans, case, lost, how, where, world_size=size, timeout=LIMIT_S, silent=silent
    )
    for rank in set(range(size)) - {lost}:
        assert outcomes[rank].kind == "PeerError", outcomes[rank]
    assert any("particle 1, rank 0 (rank 1" in outcome.text for outcome in outcomes)
