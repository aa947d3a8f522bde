"""The bytes counted at a sync point are those of the rule's formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from pool import Pool
from variants import slow_but

from .jobs import Case, one_after_the_other, swarm_of, train
from .test_agreement import Losses

BUFFER_BYTES = 4 * 10  # running mean and variance of five features
DIGESTS = 8 * 2  # of these two, by which particles know whether they have them alike
COUNTER = 8  # of batches, an integer
SCALARS = 14 * 8  # the twelve of a report, and later the distances, two numbers


@dataclass(frozen=True)
class Traffic:
    at_attach: int
    per_sync: int
    shard_bytes: int
    total: int  # of all ranks, at sync points


def traffic(case: Case, losses: tuple[float, ...]) -> Traffic:
    with swarm_of(case) as (swarm, engine):
        at_attach = swarm.session.exchange.bytes_received
        train(case, engine, range(1), spoil=Losses(losses, int(case.particles)))
        shard_bytes = sum(4 * t.numel() for t in swarm.session.synchronizer.parts.shards.tensors)
        return Traffic(at_attach, swarm.totals.bytes_received, shard_bytes, swarm.total_bytes())


SIZES = [
    *((Case(stage=stage), 2) for stage in (0, 1, 2, 3)),
    (Case(stage=2, precision="bf16"), 2),  # what travels is fp32 all the same
    (Case(stage=2, particles=4), 1),
    (Case(stage=2, particles=3), 1),
    (Case(stage=3, swarm={"bucket_mb": 40 / 2**20}), 2),
]


@pytest.mark.parametrize(
    ("case", "size"),
    slow_but(SIZES[2:5:2], SIZES),
    ids=lambda value: str(value) if isinstance(value, int) else f"{value}-{value.particles}particles",
)
@pytest.mark.parametrize("sync_mode", slow_but(["local_sgd", "pso"], ["local_sgd", "diloco", "pso"]))
def test_bytes_of_a_sync_point(pool: Pool, case: Case, size: int, sync_mode: str) -> None:
    case = replace(case, sync_mode=sync_mode, interval=1, batch_norm=case.precision == "fp32")
    num_particles, best = int(case.particles), 1
    losses = tuple(1.0 if particle == best else 2.0 for particle in range(num_particles))
    ranks = pool.run(traffic, case, losses, world_size=num_particles * size)
    buffers = BUFFER_BYTES if case.batch_norm else 0
    assert sum(rank.shard_bytes for rank in ranks[:size]) >= 4 * 69
    for number, rank in enumerate(ranks):
        particle, n = number // size, rank.shard_bytes
        all_reduce = 2 * (num_particles - 1) / num_particles
        moved = all_reduce * n if sync_mode != "pso" else n * (particle != best)
        numbers = SCALARS + (DIGESTS if case.batch_norm else 0)
        expected = moved + all_reduce * buffers + numbers * (num_particles - 1)
        num_buckets = 2 + n * 2**20 // case.swarm["bucket_mb"] / 2**40 if case.swarm else 2
        assert rank.per_sync == pytest.approx(expected, abs=0 if num_particles != 3 else num_buckets)
        assert rank.at_attach == (n + buffers + (COUNTER if case.batch_norm else 0)) * (particle != 0)
        assert rank.total == sum(other.per_sync for other in ranks)


GUARDED = {"guard": True, "fitness_steps": 1, "temperature": 0.3, "unequal_above": 0.1}
UNEQUAL = (2.0, 1.0, 2.0, 2.0)
# Of the later rules: losses, and the bytes received at sync points 0 and 1 in all-reduces of the shard,
# shards of one peer (unless it is the particle itself), and float64 of each peer.
LATER_RULES: dict[str, tuple[Case, tuple[float, ...], tuple[tuple[int, int, int], ...]]] = {
    "easgd": (Case(sync_mode="easgd"), UNEQUAL, ((1, 0, 0),) * 2),
    "nosync": (Case(sync_mode="nosync", options={"growth": "constant"}), UNEQUAL, ((1, 0, 0),) * 2),
    "noloco": (Case(sync_mode="noloco"), UNEQUAL, ((0, 1, 0),) * 2),
    "ring": (Case(sync_mode="pso", options={"topology": "ring"}), UNEQUAL, ((0, 1, 0),) * 2),
    # These losses have no gradient, so the particles are equal in spite of them.
    "guard at rest": (Case(sync_mode="swarm", options=GUARDED, probe=True), UNEQUAL, ((1, 0, 1),) * 2),
    "line_search": (Case(sync_mode="line_search", probe=True), UNEQUAL, ((1, 0, 0), (1, 0, 1))),
    "average": (Case(swarm={"optimizer_state": "average"}), UNEQUAL, ((3, 0, 1),) * 2),
    "average momentum": (
        Case(optimizer="SGD", momentum=0.9, swarm={"optimizer_state": "average"}),
        UNEQUAL,
        ((2, 0, 1),) * 2,
    ),
    "moments in turn": (
        Case(swarm={"optimizer_state": "average", "moments": {"first_every": 2, "second_every": 3}}),
        UNEQUAL,
        ((1, 0, 0), (2, 0, 1)),
    ),
    "reset": (Case(swarm={"optimizer_state": "reset"}), UNEQUAL, ((1, 0, 0),) * 2),
}


def traffic_of_each(cases: list[Case], losses: list[tuple[float, ...]]) -> list[tuple[int, list[int]]]:
    """Bytes of the shard, and what arrived at each sync point."""
    found = []
    for losses_of_case, (case, swarm, engine) in zip(losses, one_after_the_other(cases), strict=True):
        received: list[int] = []
        swarm.on_sync(lambda record, received=received: received.append(record.bytes_received))
        train(case, engine, range(2), spoil=Losses(losses_of_case, int(case.particles)))
        found.append((sum(4 * t.numel() for t in swarm.session.synchronizer.parts.shards.tensors), received))
    return found


@pytest.mark.parametrize(
    ("stage", "particles", "size"), slow_but([(2, 4, 1)], [(0, 2, 2), (1, 2, 2), (2, 4, 1), (3, 2, 2)])
)
def test_bytes_of_the_later_rules(pool: Pool, stage: int, particles: int, size: int) -> None:
    cases = [
        replace(case, stage=stage, particles=particles, interval=1, batch_norm=True)
        for case, *_ in LATER_RULES.values()
    ]
    ranks = pool.run(traffic_of_each, cases, [losses for _, losses, _ in LATER_RULES.values()])
    peers = particles - 1
    all_reduce = 2 * peers / particles
    for rank, found in enumerate(ranks):
        for (name, (_, _, parts)), (n, received) in zip(LATER_RULES.items(), found, strict=True):
            fetches = name == "noloco" or rank // size != 1  # the best one has what it would receive
            expected = [
                a * all_reduce * n + b * n * fetches + 8 * c * peers + all_reduce * BUFFER_BYTES for a, b, c in parts
            ]
            assert received == [round(value) + (SCALARS + DIGESTS) * peers for value in expected], name


@pytest.mark.parametrize(
    ("wire", "particles", "size"),
    slow_but(
        [("bf16", 2, 2), ("int4", 4, 1)],
        [(wire, *sizes) for wire in ("bf16", "int8", "int4") for sizes in ((2, 2), (4, 1))],
    ),
)
def test_bytes_of_differences(pool: Pool, particles: int, size: int, wire: str) -> None:
    """Two phases for a mean, one for the best; whole blocks of 256, for each particle in a mean."""
    cases = [
        Case(sync_mode=mode, interval=1, particles=particles, stage=stage, swarm={"wire": wire})
        for mode in ("local_sgd", "pso")
        for stage in (2, 3)
    ]
    ranks = pool.run(traffic_of_each, cases, [UNEQUAL[:particles]] * len(cases), world_size=4)
    of_a_block = {"bf16": 512, "int8": 256 + 4, "int4": 128 + 4}[wire]
    for rank, found in enumerate(ranks):
        for case, (nbytes, received) in zip(cases, found, strict=True):
            blocks = math.ceil(nbytes / 4 / 256 / particles) * particles
            moved = 2 * (particles - 1) * blocks // particles * of_a_block
            if case.sync_mode == "pso":
                moved = blocks * of_a_block * (rank // size != 1)
            assert received == [moved + SCALARS * (particles - 1)] * len(received)


def ranks_without_peers(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine)
        return swarm.totals.bytes_received, swarm.total_bytes(), swarm.session.exchange.bytes_received


def test_one_particle_sends_nothing(pool: Pool) -> None:
    assert pool.run(ranks_without_peers, Case(particles=1), world_size=2) == [(0, 0, 0)] * 2
