"""A signal to any rank, at any time: all ranks stop at the same step, and what was saved there goes on bit for bit."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from variants import slow_but

from ds_pso import PeerError
from ds_pso.distributed import ending_signals, preemption
from ds_pso.distributed.ending_signals import SIGNALS, EndingSignals

from .jobs import Case, assert_equal, swarm_of, train, working_weights

STEPS = 400  # more than any of these takes
CASE = Case(sync_mode="diloco", interval=4, swarm={"timeout_s": 20})


def train_until_asked(
    case: Case, folder: Path, signalled: dict[int, int], seconds: list[float], sign: int = signal.SIGTERM
) -> tuple[int, int]:
    """Where this rank stopped, and where it was when it learned that it should.

    Args:
        signalled: the step after which a rank gets the signal.
        seconds: that a step takes, of each particle.
        sign: which signal.
    """
    before = signal.getsignal(sign)
    with swarm_of(case) as (swarm, engine):
        assert not swarm.should_stop()
        told = -1
        for step in range(1, STEPS):
            train(case, engine, range(step - 1, step))
            time.sleep(seconds[swarm.particle])
            if step == signalled.get(swarm.world.layout.rank):
                os.kill(os.getpid(), sign)
                os.kill(os.getpid(), sign)  # launchers may send it twice
            if told < 0 and swarm._preemption._promised:
                told = step
            if swarm.should_stop():
                break
        assert swarm.should_stop()
        swarm.save(folder)
    assert signal.getsignal(sign) == before
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
    found = pool.run(train_until_asked, case, tmp_path, {3: 8}, [0.005, 0.05], signal.SIGINT)
    ((stopped, _),) = {(step, 0) for step, _ in found}
    fast, slow = found[0][1], found[3][1]
    assert slow < fast - 10, "they were not apart"
    assert fast <= stopped <= fast + 1


def one_alone(case: Case, sign: int) -> tuple[bool, bool]:
    before = {sign: signal.getsignal(sign) for sign in SIGNALS}
    with swarm_of(case) as (swarm, engine):
        asked = swarm.should_stop()
        train(case, engine, range(1))
        os.kill(os.getpid(), sign)
        found = (asked, swarm.should_stop())
    assert {sign: signal.getsignal(sign) for sign in SIGNALS} == before
    return found


@pytest.mark.parametrize("sign", SIGNALS, ids=lambda sign: sign.name)
def test_a_world_of_one(pool: Pool, sign: int) -> None:
    assert pool.run(one_alone, Case(particles=1), sign, world_size=1) == [(False, True)]


# -- signals, without a swarm -----------------------------------------------------------------


def told(*signs: int, pause_s: float = 0.0, env: dict[str, str] | None = None) -> int | None:
    """What a process has noted that gets these signals, one after the other."""
    ending_signals._ECHO_S = 0.2
    os.environ.update(env or {})
    signals = EndingSignals()
    for sign in signs:
        os.kill(os.getpid(), sign)
        time.sleep(pause_s)
    return signals.first()


def told_slowly(first: int, second: int, env: dict[str, str]) -> int | None:
    return told(first, second, pause_s=0.5, env=env)


def test_ctrl_c_is_sent_on_by_launchers(pool: Pool) -> None:
    """Once more and at once, or by deepspeed as SIGTERM to one rank after another, in up to half a minute."""
    assert pool.run(told, *[signal.SIGINT] * 3, world_size=1) == [signal.SIGINT]
    assert pool.run(told_slowly, signal.SIGINT, signal.SIGTERM, {}, world_size=1) == [signal.SIGINT]


@pytest.mark.parametrize(
    ("second", "env"),
    [(signal.SIGINT, {}), (signal.SIGTERM, {"TORCHELASTIC_RUN_ID": "1"})],  # as torchrun passes on a second Ctrl-C
    ids=["by the terminal", "by torchrun"],
)
def test_a_second_ctrl_c_ends_at_once(pool: Pool, second: int, env: dict[str, str]) -> None:
    (outcome,) = pool.outcomes(told_slowly, signal.SIGINT, second, env, world_size=1)
    assert outcome.kind == "Killed"


def told_in_a_collective() -> None:
    """Python runs no handler before this call returns, which is after more than a minute."""
    ending_signals._ECHO_S = 0.2
    signals = EndingSignals()
    for wait_s in (0.1, 0.6):
        threading.Timer(wait_s, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)
    signals.close()


def test_a_second_ctrl_c_ends_a_process_that_hangs(pool: Pool) -> None:
    (outcome,) = pool.outcomes(told_in_a_collective, world_size=1, timeout=40)
    assert outcome.kind == "Killed"


def ignored_before() -> list[bool]:
    """As ``nohup`` does, and a shell for what it starts in the background."""
    for sign in (signal.SIGHUP, signal.SIGINT):
        signal.signal(sign, signal.SIG_IGN)
    signals = EndingSignals()
    for sign in (signal.SIGHUP, signal.SIGINT):
        os.kill(os.getpid(), sign)
    return [signals.first() is None, *(signal.getsignal(s) is signal.SIG_IGN for s in (signal.SIGHUP, signal.SIGINT))]


def test_what_was_ignored_stays_ignored(pool: Pool) -> None:
    assert pool.run(ignored_before, world_size=1) == [[True] * 3]


def with_a_child() -> tuple[int | None, int | None]:
    """A child that is forked meanwhile, such as a worker of a loader: Ctrl-C leaves it alone, and SIGTERM ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what measures coverage has a handler of its own
    signals = EndingSignals()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(50,))
    child.start()
    time.sleep(0.3)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.3)
    assert child.is_alive()
    child.terminate()
    child.join(20)
    return child.exitcode, signals.first()


def test_signals_to_a_child_are_not_those_of_the_rank(pool: Pool) -> None:
    assert pool.run(with_a_child, world_size=1) == [(-signal.SIGTERM, None)]


def with_a_terminal() -> str:
    """Writes to a terminal that has hung up."""
    signals = EndingSignals()
    terminal, output = os.openpty()
    os.dup2(output, 1)
    os.close(output)
    os.kill(os.getpid(), signal.SIGHUP)
    assert signals.first() == signal.SIGHUP
    os.close(terminal)
    print("still there", flush=True)
    return "still there"


def test_output_to_a_terminal_that_has_gone_is_no_error(pool: Pool) -> None:
    assert pool.run(with_a_terminal, world_size=1) == ["still there"]


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
