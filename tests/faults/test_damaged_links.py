"""Bits that flip between real ranks: with ``checksums`` all notice, and end with the weights of a sound link."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
from integration.jobs import Case, assert_equal, one_after_the_other, train, working_weights
from pool import Pool
from utils.test_checksums import Damaging

from .test_diverged_particles import LATER_RULES

CASES: dict[str, tuple[Case, str]] = {
    "local_sgd": (Case(), "allreduce"),
    "diloco": (Case(sync_mode="diloco"), "allreduce"),
    "pso": (Case(sync_mode="pso"), "broadcast"),
    "int8": (Case(swarm={"wire": "int8"}), "alltoall_base"),
    "int8 gathered": (Case(swarm={"wire": "int8"}), "allgather"),
    "delay": (Case(swarm={"delay": 1}), "allreduce"),
    "noloco": (LATER_RULES["noloco"], "alltoall_base"),
    **{name: (case, "allreduce") for name, case in LATER_RULES.items() if name not in ("pso", "noloco")},
}


def at_once(cases: list[tuple[Case, str]], damaged: bool) -> list[Any]:
    """Of each case the weights at the end, what was repeated, and the warnings; rank 3's link flips a bit twice."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swarms = one_after_the_other([case for case, _ in cases])
        for (_, collective), (case, swarm, engine) in zip(cases, swarms, strict=True):
            group, records = swarm.world.peers.group, []
            swarm.on_sync(lambda record, records=records: records.append(record.to_json()))
            if damaged and swarm.world.layout.rank == 3:
                swarm.world.peers.group = Damaging(group, collective, 30, 2)
            train(case, engine, range(5))
            swarm.finish_pending()
            swarm.world.peers.group = group
            found.append((working_weights(engine), [record.get("repeated", 0) for record in records]))
    return [found, [str(w.message) for w in caught if "did not arrive" in str(w.message)]]


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 3))])
def test_the_weights_are_those_of_a_sound_link(pool: Pool, stage: int) -> None:
    cases = [
        (replace(case, stage=stage, seed=0, swarm={**case.swarm, "checksums": True}), collective)
        for case, collective in CASES.values()
    ]
    sound, damaged = (pool.run(at_once, cases, bad, timeout=120) for bad in (False, True))
    for number, name in enumerate(CASES):
        for rank in range(4):
            (expected, never), (weights, repeated) = sound[rank][0][number], damaged[rank][0][number]
            assert_equal(weights, expected)
            assert sum(never) == 0
            assert sum(repeated) == 2 * (rank % 2), f"{name}: the peers of rank 3, and nobody else"
    assert [len(messages) for _, messages in damaged] == [0, 2 * len(CASES), 0, 0]
