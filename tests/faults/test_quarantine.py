"""A particle that is finite and diverged all the same is left out, and starts again from the others.

The truth for the others is a swarm in which the diverged one is dead for a reason that was always seen: a NaN.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from integration.jobs import Case, assert_equal, master_pieces, one_after_the_other, place, train, working_weights
from pool import Pool
from variants import slow_but

from .test_diverged_particles import APART, LATER_RULES, Spoil

RULES: dict[str, Case] = {
    "local_sgd": Case(),
    "diloco": Case(sync_mode="diloco"),
    "pso": Case(sync_mode="pso", options={"inertia": 0.3, "cognitive": 0.5, "best": "all_time"}),
    "bf16 wire": Case(swarm={"wire": "bf16"}),
    "reset": Case(swarm={"optimizer_state": "reset"}),
    **{name: case for name, case in LATER_RULES.items() if name != "pso"},
    "pso ring": LATER_RULES["pso"],
}
MAD = 1  # particle


def at_once(cases: list[Case], spoils: list[Spoil]) -> list[Any]:
    """Of each case the records, and the weights after the sync point at which it was diverged and at the end."""
    found = []
    for spoil, (case, swarm, engine) in zip(spoils, one_after_the_other(cases), strict=True):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record, records=records: records.append(record.to_json()))
        train(case, engine, range(4), spoil=spoil)
        at_sync = working_weights(engine)
        train(case, engine, range(4, 6), spoil=spoil)
        found.append((records, at_sync, working_weights(engine)))
    return found


@dataclass(frozen=True)
class Report(Spoil):
    """The loss that is reported is larger, and the gradients are those of the true one."""

    def __call__(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        particle, _, _ = place(Case())
        hit = particle == self.particle and step == self.step
        return loss + (loss.detach() * (self.by - 1) if hit else 0.0)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))])
def test_every_rule_treats_it_as_a_dead_one(pool: Pool, stage: int) -> None:
    """A loss far above the others', and a NaN in its place: the weights of all are the same bits."""
    cases = [replace(case, stage=stage, seed=0) for case in RULES.values()]
    # 1e4 times the loss of one step is far more than four times what the others have in two.
    ranks = pool.run(
        at_once,
        [c for c in cases for _ in range(2)],
        [Report(1e4, MAD), Report(math.nan, MAD)] * len(cases),
        timeout=120,
    )
    for number, rule in enumerate(RULES):
        for rank in ranks:
            (high, *weights), (dead, *expected) = rank[2 * number : 2 * number + 2]
            assert [record["alive"] for record in high] == [(True, True), (True, False), (True, True)], rule
            assert "times" in high[1]["left_out"]["1"]
            assert dead[1]["left_out"] == {"1": "its loss is not finite"}
            assert "left_out" not in high[0] | high[2]
            for mine, theirs in zip(weights, expected, strict=True):
                assert_equal(mine, theirs)
        if cases[number].sync_mode not in APART:
            assert_equal(ranks[0][2 * number][1], ranks[3][2 * number][1])


def one_explodes(case: Case, lr: float) -> Any:
    records: list[dict[str, Any]] = []
    case, swarm, engine = next(one_after_the_other([case]))
    swarm.on_sync(lambda record: records.append(record.to_json()))
    if place(case)[0] == MAD:
        engine.optimizer.param_groups[0]["lr"] = lr
    train(case, engine, range(4))
    if place(case)[0] == MAD:
        engine.optimizer.param_groups[0]["lr"] = case.lr
    losses = train(case, engine, range(4, 16))
    swarm.close()
    return records, losses


@pytest.mark.parametrize(
    ("stage", "size"), [(0, 1), (3, 2), *(pytest.param(2, size, marks=pytest.mark.slow) for size in (1, 2))]
)
def test_a_learning_rate_that_explodes(pool: Pool, stage: int, size: int) -> None:
    """Real training: the loss goes through the roof, and is that of the others again after the sync point."""
    case = Case(stage=stage, particles=3, interval=4, optimizer="SGD", lr=0.05)
    ranks = pool.run(one_explodes, case, 8.0, world_size=3 * size)
    for records, _ in ranks:
        assert records[0]["alive"] == (True, False, True)
        assert "times" in records[0]["left_out"]["1"]
        assert all(record["alive"] == (True,) * 3 for record in records[1:])
    losses = [np.mean([rank[1] for rank in ranks[p * size : (p + 1) * size]], axis=0) for p in range(3)]
    assert losses[MAD].max() < 2 * max(losses[0].max(), losses[2].max())


def flipped(value: float, bit: int) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", bits ^ 1 << bit))[0]


FLIPS = {31: False, 30: True, 29: False, 26: False, 23: False, 22: False, 0: False}  # bit: whether it is noticed
VALUE = 0.02  # as weights of real models are


def flip_bits(case: Case) -> Any:
    """One element of one shard of the diverged particle, before each of several sync points."""
    case, swarm, engine = next(one_after_the_other([case]))
    shards, found = swarm.session.synchronizer.parts.shards, []
    particle, rank, size = place(case)
    for bit in FLIPS:
        train(case, engine, range(1))
        segment = shards.segments[-1]
        x = shards.tensors[segment.shard]
        if rank == size - 1:
            x[segment.shard_start] = flipped(VALUE, bit) if particle == MAD else VALUE
        mine = master_pieces(swarm)
        swarm.sync()
        found.append((swarm.last_sync.to_json(), mine, master_pieces(swarm)))
    swarm.close()
    return found


@pytest.mark.parametrize("stage", slow_but([3], [0, 2, 3]))
def test_a_flipped_bit_in_memory(pool: Pool, stage: int) -> None:
    """The top bit of the exponent makes it huge and is noticed; no other takes a weight below 2 above 2."""
    ranks = pool.run(flip_bits, Case(stage=stage, interval=1000))
    for number, (bit, noticed) in enumerate(FLIPS.items()):
        for rank, other in ((0, 2), (1, 3)):
            (record, mine, after), (_, theirs, after_theirs) = ranks[rank][number], ranks[other][number]
            assert record["alive"] == (True, not noticed), bit
            for (_, _, a), (_, _, b), (_, _, c), (_, _, d) in zip(mine, theirs, after, after_theirs, strict=True):
                expected = a if noticed else (a / 2 + b / 2)
                np.testing.assert_array_equal(c, d)
                np.testing.assert_allclose(c, expected, rtol=1e-6, atol=1e-7)
                assert np.abs(c).max() < 4


@pytest.mark.parametrize("bit", range(32))
def test_no_other_bit_takes_a_weight_to_two(bit: int) -> None:
    values = [sign * 10.0**k for k in range(-30, 0) for sign in (1, -1)] + [1.0, 1.9999]
    found = [abs(flipped(value, bit)) for value in values]
    assert max(found) < 2 or bit == 30
    if bit == 30:
        assert min(found) > 1e6


def off(case: Case) -> Any:
    case, swarm, engine = next(one_after_the_other([case]))
    train(case, engine, range(2), spoil=Report(1e6, MAD, step=1))
    record = swarm.last_sync
    swarm.close()
    return record.alive, dict(record.left_out)


def test_it_can_be_switched_off(pool: Pool) -> None:
    assert pool.run(off, Case(swarm={"quarantine_loss": None})) == [((True, True), {})] * 4


@pytest.mark.parametrize(
    "swarm",
    [
        pytest.param({"delay": 1}, marks=pytest.mark.slow),
        {"delay": 2, "fragments": 2},
        {"delay": 1, "fragments": 2, "streaming": True},
    ],
    ids=["delay", "fragments", "streaming"],
)
def test_in_the_background(pool: Pool, swarm: dict[str, Any]) -> None:
    """As a dead one: bits of a NaN in its place."""
    cases = [Case(swarm=swarm, seed=0, interval=2)] * 2
    ranks = pool.run(at_once, cases, [Report(1e4, MAD), Report(math.nan, MAD)])
    for (high, *weights), (dead, *expected) in ranks:
        assert [record["alive"] for record in high] == [record["alive"] for record in dead]
        assert (True, False) in [record["alive"] for record in high]
        for mine, theirs in zip(weights, expected, strict=True):
            assert_equal(mine, theirs)
