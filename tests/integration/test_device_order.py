"""Where a GPU may still be busy it is waited for. On a CPU that is seen with a wait that looks on instead."""

from __future__ import annotations

from typing import Any

from pool import Pool

from ds_pso.sync import overlapped, synchronizer

from .jobs import Case, swarm_of, train


def arrivals(case: Case) -> list[list[bool]]:
    """At each wait of the thread, which fragments count as arrived."""
    seen: list[list[bool]] = []
    with swarm_of(case) as (swarm, engine):
        overlap: Any = swarm.session.synchronizer.overlap
        overlapped.wait_for_device = lambda: seen.append([event.is_set() for event in overlap.pending.arrived])
        train(case, engine)
    return seen


def test_a_fragment_has_come_when_the_device_is_done_with_it(pool: Pool) -> None:
    case = Case(steps=6, interval=3, swarm={"delay": 3, "fragments": 3})
    for seen in pool.run(arrivals, case, world_size=2):
        assert seen[:3] == [[False, False, False], [True, False, False], [True, True, False]]


def waits(case: Case) -> list[int]:
    """The optimizer steps after which training waits for the device."""
    steps: list[int] = []
    with swarm_of(case) as (_, engine):
        synchronizer.wait_for_device = lambda: steps.append(engine.global_steps)
        train(case, engine)
    return steps


def test_a_sync_begins_when_the_device_is_done_with_the_step_and_other_steps_do_not_wait(pool: Pool) -> None:
    for delay in (0, 2):
        case = Case(steps=8, interval=3, swarm={"delay": delay})
        assert pool.run(waits, case, world_size=2) == [[3, 6], [3, 6]]
