"""Asynchronous particles: one that is slow, stopped or lost delays nobody, and messages pull the others together.

No clock decides: a particle sleeps until the others have done all their steps, which they would never do if they
waited for it.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.jobs import Case, master_pieces, place, swarm_of, train, working_weights
from pool import Pool
from variants import slow_but

from ds_pso.errors import SwarmError

ASYNCHRONOUS = {"asynchronous": True, "growth": "constant", "pressure": 1.0}
CASE = Case(sync_mode="nosync", interval=1, steps=12, options=ASYNCHRONOUS)
LIMIT_S = 50.0


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.01)


def listen(swarm: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    swarm.on_sync(lambda record: records.append(record.to_json()))
    return records


def sleep_while_the_others_train(case: Case, slow: int, folder: Path) -> Any:
    particle, rank, size = place(case)
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(3))
        if particle == slow:
            others = [r for r in range(size * int(case.particles)) if r // size != slow]
            wait_for(*(folder / str(r) for r in others))
        train(case, engine, range(3, case.steps))
        (folder / str(particle * size + rank)).touch()
        return [record["from"] for record in records], swarm.totals.waited_s, working_weights(engine)


@pytest.mark.parametrize(
    ("stage", "particles", "size", "slow"),
    slow_but([(3, 2, 2, 0)], [(1, 3, 1, 2), (3, 2, 2, 0), (0, 2, 2, 1)]),
    ids=str,
)
def test_a_slow_particle_delays_nobody(
    pool: Pool, tmp_path: Path, stage: int, particles: int, size: int, slow: int
) -> None:
    case = replace(CASE, stage=stage, particles=particles)
    ranks = pool.run(sleep_while_the_others_train, case, slow, tmp_path, world_size=particles * size, timeout=LIMIT_S)
    for senders, waited, weights in ranks:
        assert len(senders) == case.steps
        assert waited == 0
        assert all(np.isfinite(value).all() for value in weights.values())
    for start in range(0, particles * size, size):  # the ranks of a particle use the same messages
        assert all(rank[0] == ranks[start][0] for rank in ranks[start : start + size])


def lose_one(case: Case, lost: int, how: int, folder: Path) -> Any:
    particle, rank, size = place(case)
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(3))
        if particle == lost:
            (folder / f"lost {rank}").touch()
            os.kill(os.getpid(), how)
        wait_for(*(folder / f"lost {r}" for r in range(size)))
        train(case, engine, range(3, case.steps))
        done = len(records), engine.global_steps, working_weights(engine)
        (folder / f"done {particle} {rank}").touch()
        wait_for(*(folder / f"done {p} {r}" for p in range(int(case.particles)) if p != lost for r in range(size)))
        try:
            swarm.export(folder / "model")
        except SwarmError as error:
            return done, f"{type(error).__name__}: {error}"
        return done, "exported"


@pytest.mark.parametrize(
    ("particles", "size", "lost", "how"),
    [
        (3, 1, 0, signal.SIGSTOP),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in [(3, 1, 1, signal.SIGKILL), (2, 2, 1, signal.SIGSTOP)]),
        pytest.param(2, 2, 0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_lost_particle_delays_nobody(
    pool: Pool, tmp_path: Path, particles: int, size: int, lost: int, how: int
) -> None:
    """The others do all their steps; what needs everybody, the export, names who is missing."""
    case = replace(CASE, stage=2, particles=particles, swarm={"timeout_s": 3})
    gone = tuple(range(lost * size, (lost + 1) * size))
    outcomes = pool.outcomes(
        lose_one,
        case,
        lost,
        how,
        tmp_path,
        world_size=particles * size,
        timeout=LIMIT_S,
        silent=gone if how == signal.SIGSTOP else (),
    )
    for rank, outcome in enumerate(outcomes):
        if rank in gone:
            assert outcome.kind in ("Killed", "Silent")
            continue
        (syncs, steps, weights), end = outcome.get()
        assert (syncs, steps) == (case.steps, case.steps)
        assert all(np.isfinite(value).all() for value in weights.values())
        assert end.startswith("PeerError"), end
        assert f"particle {lost}, rank {rank % size}" in end


# -- what messages do ------------------------------------------------------------------------


def exchange_messages(case: Case, wanted: int, folder: Path) -> Any:
    """Particles a unit apart exchange messages, without training, until each has had some."""
    particle, rank, size = place(case)
    with swarm_of(case) as (swarm, _):
        records = listen(swarm)
        shards = swarm.session.synchronizer.parts.shards
        start = np.concatenate([values for _, _, values in master_pieces(swarm)])
        for tensor in shards.tensors:
            tensor.add_(particle)
        shards.publish()
        before = swarm.session.exchange.bytes_received
        everybody = [folder / f"{p} {r}" for p in range(int(case.particles)) for r in range(size)]
        seen = []
        while True:
            # All ranks of a particle must leave the loop at the same turn.
            enough = all(path.exists() for path in everybody)
            if all(row[0] for row in swarm.world.local.gather([float(enough)])):
                break
            swarm.sync()
            values = np.concatenate([values for _, _, values in master_pieces(swarm)]) - start
            seen.append((float(values.min()), float(values.max())))
            if sum(record["from"] is not None for record in records) >= wanted:
                (folder / f"{particle} {rank}").touch()
            time.sleep(0.005)
        messages = [(record["from"], record["age"]) for record in records if record["from"] is not None]
        shard_bytes = sum(4 * tensor.numel() for tensor in shards.tensors)
        return seen, messages, swarm.session.exchange.bytes_received - before, shard_bytes


@pytest.mark.parametrize(("stage", "particles", "size"), [(1, 4, 1), (3, 2, 2)])
def test_messages_pull_the_models_together(pool: Pool, tmp_path: Path, stage: int, particles: int, size: int) -> None:
    case = replace(CASE, stage=stage, particles=particles, options=ASYNCHRONOUS | {"max_staleness": 10**6})
    ranks = pool.run(exchange_messages, case, 12, tmp_path, timeout=LIMIT_S)
    ends = []
    for rank, (seen, messages, nbytes, shard_bytes) in enumerate(ranks):
        low, high = seen[-1]
        assert high - low < 1e-5, "all elements take the same part of the way"
        ends.append(low)
        for low, high in seen:  # a mean of two never leaves the hull
            assert -1e-5 <= low <= high <= particles - 1 + 1e-5
        assert {sender for sender, _ in messages} <= set(range(particles)) - {rank // size}
        assert nbytes % shard_bytes == 0
        assert nbytes >= len(messages) * shard_bytes  # others came, too, and were overtaken
    drift = max(ends) - min(ends)
    assert drift < 0.3 * (particles - 1), ends


def test_all_ranks_of_a_particle_read_the_same_message(pool: Pool, tmp_path: Path) -> None:
    """Shards of one model should not move towards states of different times, or of different peers."""
    case = replace(CASE, options=ASYNCHRONOUS | {"max_staleness": 10**6})
    ranks = pool.run(exchange_messages, case, 30, tmp_path, timeout=LIMIT_S)
    for first, mate in (ranks[:2], ranks[2:]):
        assert first[1] == mate[1]  # (sender, age) of each message used


def messages_and_none(case: Case, folder: Path) -> Any:
    """Particle 1 writes one message at its first sync point; particle 0 reads it at its third."""
    with swarm_of(case) as (swarm, _):
        records = listen(swarm)
        if swarm.particle == 1:
            wait_for(folder / "two behind me")
            swarm.sync()
            (folder / "sent").touch()
            wait_for(folder / "read")
        else:
            swarm.sync()
            swarm.sync()
            (folder / "two behind me").touch()
            wait_for(folder / "sent")
            time.sleep(0.5)  # for the message to arrive
            swarm.sync()
            swarm.sync()
            (folder / "read").touch()
        return records


@pytest.mark.parametrize(("staleness", "used"), [(1, None), (2, 1)])
def test_a_message_is_used_once_and_not_when_it_is_old(
    pool: Pool, tmp_path: Path, staleness: int, used: int | None
) -> None:
    case = replace(CASE, options=ASYNCHRONOUS | {"max_staleness": staleness})
    first, second = pool.run(messages_and_none, case, tmp_path, world_size=2)
    assert [record["from"] for record in first] == [None, None, used, None]
    if used is not None:
        assert first[2]["age"] == 2
    (message,) = second
    assert message["from"] in (0, None)  # what particle 0 had sent before, if it has come
    assert list(np.isnan(message["losses"])) == [True, True], "it knows its own loss alone, and has none"


def recover_by_message(case: Case, folder: Path) -> Any:
    """A particle of NaN sends nothing, and starts again from the next message; the other goes on writing."""
    particle, rank, _ = place(case)
    with swarm_of(case) as (swarm, engine):
        records = listen(swarm)
        train(case, engine, range(2))
        tensors = swarm.session.synchronizer.parts.shards.tensors
        if particle == 1:
            for tensor in tensors:
                tensor.fill_(math.nan)
        while True:
            recovered = [path.exists() for path in (folder / "healed 0", folder / "healed 1")]
            if all(all(row) for row in swarm.world.local.gather([float(value) for value in recovered])):
                break
            swarm.sync()
            if particle == 1 and all(bool(tensor.isfinite().all()) for tensor in tensors):
                (folder / f"healed {rank}").touch()
            time.sleep(0.005)
        train(case, engine, range(2, 4))
        return [list(record["alive"]) for record in records], working_weights(engine)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 3])
def test_a_particle_of_nan_starts_again_from_a_message(pool: Pool, tmp_path: Path, stage: int) -> None:
    case = replace(CASE, stage=stage, steps=4, batch_norm=True)
    ranks = pool.run(recover_by_message, case, tmp_path, timeout=LIMIT_S)
    for rank, (alive, weights) in enumerate(ranks):
        assert all(np.isfinite(value).all() for value in weights.values())
        own = [row[rank // 2] for row in alive]
        assert all(own[:2])
        assert all(own) == (rank < 2), "NaN reached the healthy one" if rank < 2 else "it never was dead"
        assert own[-1]
