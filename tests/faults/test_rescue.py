"""Particles that have lost their peers save what they have, before they end."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from elastic.swarms import elastic, lighthouse, places
from integration.jobs import Case, assert_equal, swarm_of, train, working_weights
from pool import Pool
from variants import slow_but

from ds_pso.errors import PeerError

CASE = Case(steps=4, interval=2, swarm={"timeout_s": 4}, seed=1)


SAVED = slow_but([(3, (0, 1))], [(2, (3,)), (3, (0, 1)), (2, (2, 3)), (2, (0,))])


def lose_and_rescue(case: Case, lost: tuple[int, ...], folder: Path, in_the_exchange: bool) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))
        me = swarm.world.layout.rank
        if in_the_exchange:
            weighted_mean = swarm.session.exchange.weighted_mean

            def broken(*arguments: Any) -> Any:
                for piece in weighted_mean(*arguments):
                    yield piece
                    if me in lost:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise PeerError("the all-reduce broke")

            swarm.session.exchange.weighted_mean = broken
        elif me in lost:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            swarm.sync()
        except PeerError:
            return swarm.rescue(folder), working_weights(engine)


def resume(case: Case, folder: Path) -> Any:
    with swarm_of(case) as (swarm, engine):
        has_one = (folder / f"particle_{swarm.particle}").is_dir()
        step = swarm.load(folder) if has_one else 0
        loaded = working_weights(engine)
        while engine.global_steps < 4:
            train(case, engine, range(engine.global_steps, engine.global_steps + 1))
        return step, loaded, working_weights(engine)


@pytest.mark.parametrize(("stage", "lost"), SAVED, ids=str)
def test_what_can_be_saved_is_saved(pool: Pool, tmp_path: Path, stage: int, lost: tuple[int, ...]) -> None:
    """A particle that is whole is saved and continues, as an elastic swarm in which the lost one is recovered."""
    case = replace(CASE, stage=stage)
    outcomes = pool.outcomes(lose_and_rescue, case, lost, tmp_path, False, timeout=60)
    gone = lost[0] // 2
    kept = [0, 1] if gone == 1 else [2, 3]
    for rank in set(range(4)) - set(lost) - set(kept):
        assert outcomes[rank].get()[0] is None, "its particle is not whole"
    saved = [outcomes[rank].get() for rank in kept]
    assert {folder for folder, _ in saved} == {tmp_path / f"particle_{1 - gone}" / "step_00000003"}
    with lighthouse() as url:
        ranks = pool.run(resume, elastic(case), tmp_path, env=places(url, 2, 2), timeout=60)
    for rank, (step, loaded, weights) in enumerate(ranks):
        assert step == (3 if rank in kept else 0)
        if rank in kept:
            assert_equal(loaded, saved[0][1])
        assert_equal(weights, ranks[0][2])


def test_half_an_exchange_is_not_saved(pool: Pool, tmp_path: Path) -> None:
    outcomes = pool.outcomes(lose_and_rescue, CASE, (2, 3), tmp_path, True, timeout=60)
    assert [outcome.get()[0] for outcome in outcomes[:2]] == [None, None]
    assert not list(tmp_path.iterdir())
