"""Sync points in the background: what comes of them, and that nobody waits for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool import Pool
from variants import slow_but

from ds_pso.rules.base import Plan, SyncPoint
from ds_pso.rules.local_sgd import LocalSGD

from .jobs import Case, assert_close, assert_equal, one_after_the_other, swarm_of, train, working_weights
from .oracle import train_particles
from .test_truth import RULES_FOR_FOUR, SWARM, assert_true, weights_of_each

BASE = Case(steps=10, interval=3)
RULES = {
    name: replace(case, steps=10, interval=3, swarm=case.swarm | ({"total_steps": 10} if case.swarm else {}))
    for name, case in RULES_FOR_FOUR.items()
    if not case.probe and "average" not in name and "rda" not in name and case.interval == 2
}
RULES["swarm"] = replace(BASE, sync_mode="swarm", options=SWARM | {"guard": False, "lr_spread": 1.0})


@pytest.mark.parametrize(
    ("stage", "particles", "delay"),
    [
        pytest.param(0, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 3, marks=pytest.mark.slow),
        (3, 2, 1),
        pytest.param(2, 4, 2, marks=pytest.mark.slow),
        pytest.param(3, 4, 3, marks=pytest.mark.slow),
    ],
)
def test_every_rule_is_corrected_by_the_steps_meanwhile(pool: Pool, stage: int, particles: int, delay: int) -> None:
    """x <- result + (x now - x when it began), against NumPy; a delay of the whole interval, too."""
    cases = [
        replace(case, stage=stage, particles=particles, swarm=case.swarm | {"delay": delay}) for case in RULES.values()
    ]
    ranks = pool.run(weights_of_each, cases, world_size=4, timeout=120)
    for index, (name, case) in enumerate(zip(RULES, cases, strict=True)):
        try:
            assert_true([found[index] for found in ranks], case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_a_delay_of_zero_is_a_sync_point_that_waits(pool: Pool) -> None:
    for wire in ("fp32", "int4"):
        cases = [replace(BASE, sync_mode="diloco", swarm={"wire": wire, **delay}) for delay in ({}, {"delay": 0})]
        for one, other in pool.run(weights_of_each, cases, world_size=4):
            assert_equal(one, other)


def moments_of_steps(case: Case, late: int) -> list[tuple[float, float]]:
    """(begin, end) of each step; particle ``late`` comes a second late to the step after the sync point began."""
    times = []
    with swarm_of(case) as (swarm, engine):
        for step in range(case.steps):
            if swarm.particle == late and step == case.interval - 1:
                time.sleep(1.0)
            begin = time.time()
            train(case, engine, range(step, step + 1))
            times.append((begin, time.time()))
    return times


@pytest.mark.parametrize("delay", [0, 2])
def test_nobody_waits_for_a_late_particle_until_it_is_due(pool: Pool, delay: int) -> None:
    case = Case(steps=5, interval=3, swarm={"delay": delay})
    ranks = pool.run(moments_of_steps, case, 1, world_size=4)
    arrives = min(ranks[rank][2][0] for rank in (2, 3))  # of the late one at the sync point
    for rank in (0, 1):
        syncs, applies = (ranks[rank][step][1] for step in (2, 4))
        assert (syncs < arrives) == (delay > 0)
        assert applies > arrives


def with_interruptions(case: Case, interrupt: bool, folder: Path) -> Any:
    """All that can be asked of a swarm while a sync point goes on."""
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            if interrupt and swarm.session.synchronizer.overlap.pending is not None:
                with swarm.consensus():
                    consensus = working_weights(engine)
                swarm.save(folder)
                swarm.export(folder / "model")
                sums = [float(values.sum()) for name, values in consensus.items() if "running" not in name]
                assert [swarm.gather(value) for value in sums] == [[value, value] for value in sums]
                assert swarm.total_bytes() >= 0
        totals = swarm.totals
        return working_weights(engine), records, totals.overlapped_s, totals.count


def test_what_is_asked_meanwhile_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    case = Case(sync_mode="easgd", steps=8, interval=3, batch_norm=True, seed=1, swarm={"delay": 2, "wire": "int8"})
    interrupted, whole = (
        pool.run(with_interruptions, case, interrupt, tmp_path, world_size=4) for interrupt in (True, False)
    )
    for (weights, records, _, _), (expected, _, overlapped, count) in zip(interrupted, whole, strict=True):
        assert_equal(weights, expected)
        assert [record["staleness"] for record in records] == [2, 2]
        assert all(record["bytes_received"] > 0 for record in records)
        assert count == 2
        assert overlapped > 0


def statistics_at_the_sync_point(case: Case) -> Any:
    with swarm_of(case) as (_, engine):
        norm = engine.module.norm
        train(case, engine, range(2))
        before = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
        train(case, engine, range(2, 3))
        return before, (norm.running_mean.numpy().copy(), norm.running_var.numpy().copy())


def test_statistics_become_the_mean_of_the_peers_as_it_was(pool: Pool) -> None:
    ranks = pool.run(statistics_at_the_sync_point, Case(batch_norm=True, swarm={"delay": 1}), world_size=4)
    for rank, (_, after) in enumerate(ranks):
        peers = [ranks[other][0] for other in (rank, (rank + 2) % 4)]
        for i in range(2):
            np.testing.assert_allclose(after[i], np.mean([peer[i] for peer in peers], axis=0), rtol=1e-6)


def meet_by_hand(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(4))
        assert swarm.session.synchronizer.overlap.pending is not None
        swarm.sync()
        assert swarm.session.synchronizer.overlap.pending is None
        weights = working_weights(engine)
        train(case, engine, range(4, 7))  # leaves one pending
        assert swarm.session.synchronizer.overlap.pending is not None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            swarm.close()
        told = ["a delayed sync point is pending" in str(warning.message) for warning in said]
        assert any(told) == swarm.is_leader
        return weights, swarm.totals.count


def test_a_sync_point_by_hand_comes_after_the_one_that_is_pending(pool: Pool) -> None:
    ranks = pool.run(meet_by_hand, replace(BASE, swarm={"delay": 3}), world_size=4)
    for weights, count in ranks:
        assert_equal(weights, ranks[0][0])
        assert count == 2


def one_goes_mad(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        mad = swarm.particle == 1
        train(case, engine, spoil=lambda step, loss: loss * float("nan") if mad and step == 1 else loss)
        return working_weights(engine), swarm.last_losses


@pytest.mark.parametrize("sync_mode", ["local_sgd", "easgd"])
def test_a_diverged_particle_restarts_where_the_others_were(pool: Pool, sync_mode: str) -> None:
    """Its own steps meanwhile do not count: they began nowhere."""
    case = Case(sync_mode=sync_mode, steps=4, interval=2, swarm={"delay": 2})
    ranks = pool.run(one_goes_mad, case, world_size=4)
    alone = train_particles(replace(case, particles=1, interval=2, swarm={"delay": 2}))[0]
    for rank, (weights, _) in enumerate(ranks):
        assert all(np.isfinite(values).all() for values in weights.values())
        if sync_mode == "local_sgd" and rank < 2:
            assert_close(weights, alone)


def dies_once(case: Case) -> Any:
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        mad = swarm.particle == 1
        train(case, engine, spoil=lambda step, loss: loss * float("nan") if mad and step == 2 else loss)
    return [record["alive"] for record in records], [record["weights"] for record in records]


@pytest.mark.parametrize("delay", slow_but([2], [0, 2, 4]))
def test_it_dies_only_once(pool: Pool, delay: int) -> None:
    """The losses of its dead weights, until the result is due, are not held against the new ones, nor counted for."""
    case = Case(steps=12, interval=4, swarm={"delay": delay, "total_steps": 12})
    trained = 4 - delay  # since it lives again
    for alive, weights in pool.run(dies_once, case, world_size=4):
        assert alive == [(True, False), (True, True), (True, True)]
        assert weights == [(1, 0), (4 / (4 + trained), trained / (4 + trained)), (0.5, 0.5)]


class Scores(LocalSGD):
    """Asks for a score without having said so."""

    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        return replace(super().plan(sync, memory), score=True)


def meet_with_scores(case: Case) -> None:
    with swarm_of(case) as (_, engine):
        train(case, engine)


def test_a_rule_that_scores_is_refused_also_if_it_did_not_say_so(pool: Pool) -> None:
    case = Case(sync_mode=f"{__name__}:Scores", steps=3, swarm={"delay": 1})
    for outcome in pool.outcomes(meet_with_scores, case, world_size=4):
        assert outcome.kind == "SwarmError", outcome
        assert "swarm.delay: the rule scores weights before it settles" in outcome.text


def go_on_with_a_shorter_interval(case: Case, folder: Path) -> Any:
    records: list[dict[str, Any]] = []
    for number, (_, swarm, engine) in enumerate(
        one_after_the_other([case, replace(case, interval=2, swarm={"delay": 2})])
    ):
        if number == 0:
            train(case, engine, range(5))
            swarm.save(folder)
        else:
            swarm.on_sync(lambda record: records.append(record.to_json()))
            swarm.load(folder)
            train(case, engine, range(5, 7))
    return [(record["staleness"], record["sync"]) for record in records]


def test_what_is_pending_is_applied_before_the_next_begins(pool: Pool, tmp_path: Path) -> None:
    """Saved when one was due in three steps; resumed with an interval of two."""
    case = Case(steps=8, interval=4, swarm={"delay": 4})
    assert pool.run(go_on_with_a_shorter_interval, case, tmp_path, world_size=4) == [[(2, 0)]] * 4


def ask_meanwhile(case: Case) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine, range(2))
        if swarm.particle == 1:
            time.sleep(1.0)
        train(case, engine, range(2, 3))
        swarm.gather(0.0)  # must wait for the sync point
        train(case, engine, range(3, 5))
    return records[0]


def test_waiting_for_it_in_between_is_counted(pool: Pool) -> None:
    ranks = pool.run(ask_meanwhile, Case(steps=5, interval=3, swarm={"delay": 2}), world_size=4)
    for record in ranks[:2]:
        assert record["seconds"] > 0.5
        assert record["overlapped_s"] < 0.5


def nobody_is_left(case: Case) -> Any:
    records: list[dict[str, Any]] = []
    with swarm_of(case) as (swarm, engine):
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine, spoil=lambda step, loss: loss * float("nan") if step == 1 else loss)
    return records


def test_if_all_have_diverged_nothing_moves(pool: Pool) -> None:
    for records in pool.run(nobody_is_left, Case(steps=3, swarm={"delay": 1}), world_size=4):
        assert [record["alive"] for record in records] == [(False, False)]
