"""Every rule under every way to shard the model computes what NumPy and plain torch compute.

So the result of a sync does not depend on the ZeRO stage, on the number of ranks in a particle,
on parameter groups, buckets or micro-batches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pool import Outcome, Pool
from variants import slow_but

from .jobs import (
    Case,
    Net,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    master_pieces,
    one_after_the_other,
    swarm_of,
    train,
    working_weights,
)
from .oracle import follow, make_oracle, train_particles

LONG = {"total_steps": 6}
SWARM = {
    "inertia": 0.3,
    "guard": True,
    "fitness_steps": 2,
    "temperature": 0.03,
    "unequal_above": 0.1,
    "lr_spread": 2.0,
    "lr_step": 1.3,
}
RULES = {
    "local_sgd": Case(),
    "diloco": Case(sync_mode="diloco", steps=6),
    "diloco-no-momentum": Case(sync_mode="diloco", options={"outer_lr": 0.5, "outer_momentum": 0.0}),
    "diloco-rda": Case(sync_mode="diloco", steps=6, options={"merge": "rda"}),
    "easgd": Case(sync_mode="easgd", steps=6, options={"beta": 0.8}),
    "noloco": Case(sync_mode="noloco", steps=6, options={"outer_lr": 0.8}),
    "nosync": Case(sync_mode="nosync", steps=6, options={"pressure": 0.2, "final_pressure": 0.9}, swarm=LONG),
    "nosync-exponential": Case(sync_mode="nosync", steps=6, options={"growth": "exponential"}, swarm=LONG),
    "pso": Case(sync_mode="pso"),
    "pso-inertia-cognitive": Case(sync_mode="pso", steps=6, options={"inertia": 0.4, "cognitive": 0.6, "social": 0.8}),
    "pso-all-time": Case(sync_mode="pso", steps=6, options={"best": "all_time", "inertia": 0.3}),
    "pso-random": Case(sync_mode="pso", steps=6, options={"randomness": "per_sync", "inertia": 0.2, "cognitive": 0.5}),
    "pso-per-tensor": Case(
        sync_mode="pso",
        steps=6,
        options={
            "randomness": "per_tensor",
            "inertia": 0.2,
            "final_inertia": 0.7,
            "cognitive": 0.5,
            "final_social": 0.4,
            "velocity_clamp": 0.01,
            "best": "all_time",
        },
        swarm=LONG,
    ),
    "pso-constriction": Case(
        sync_mode="pso", steps=6, options={"constriction": True, "cognitive": 2.05, "social": 2.05, "best": "all_time"}
    ),
    "swarm": Case(sync_mode="swarm", steps=6, probe=True, options=SWARM),
    "swarm-to-the-end": Case(
        sync_mode="swarm",
        interval=1,
        steps=12,
        swarm={"total_steps": 12},
        options=SWARM | {"guard": False, "inertia": 0.6, "lr_step": 2.0, "fitness_steps": 3},
    ),
    "line_search": Case(sync_mode="line_search", steps=6, probe=True),
    "average-adam": Case(sync_mode="pso", steps=6, swarm={"optimizer_state": "average"}),
    "average-momentum": Case(
        optimizer="SGD", lr=0.1, momentum=0.9, sync_mode="easgd", steps=6, swarm={"optimizer_state": "average"}
    ),
    "moments-adam": Case(
        steps=8,
        interval=1,
        swarm={"optimizer_state": "average", "moments": {"first_every": 3, "second_every": 2}},
    ),
    "reset-adam": Case(steps=6, swarm={"optimizer_state": "reset"}),
    "reset-momentum": Case(
        optimizer="SGD", lr=0.1, momentum=0.9, sync_mode="pso", steps=6, swarm={"optimizer_state": "reset"}
    ),
}
# With two particles a ring is the same as all, and one candidate of two is soon found.
RULES_FOR_FOUR = RULES | {
    "pso-ring": Case(sync_mode="pso", steps=6, options={"topology": "ring", "social": 1.2}),
    "pso-ring-all-time": Case(
        sync_mode="pso", steps=6, options={"topology": "ring", "best": "all_time", "cognitive": 0.5, "inertia": 0.3}
    ),
}


def final_weights(case: Case) -> Weights:
    with swarm_of(case) as (_, engine):
        train(case, engine)
        return working_weights(engine)


def assert_true(ranks: list[Weights], case: Case, fragment_of: np.ndarray | None = None) -> None:
    size = len(ranks) // int(case.particles)
    for particle, expected in enumerate(train_particles(case, fragment_of)):
        first, *local_ranks = ranks[particle * size : (particle + 1) * size]
        assert_close(first, expected)
        for mate in local_ranks:
            assert_equal(mate, first)


def assert_truth(pool: Pool, case: Case, particle_size: int) -> None:
    assert_true(pool.run(final_weights, case, world_size=int(case.particles) * particle_size), case)


def weights_of_each(cases: list[Case]) -> list[Weights]:
    found = []
    for case, _, engine in one_after_the_other(cases):
        train(case, engine)
        found.append(working_weights(engine))
    return found


class Launches:
    """The final weights of all rules, from one launch for each stage and number of particles."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._outcomes: dict[tuple[int, int], list[Outcome]] = {}

    def assert_true(self, rules: dict[str, Case], name: str, stage: int, particles: int) -> None:
        cases = [replace(case, stage=stage, particles=particles) for case in rules.values()]
        if (stage, particles) not in self._outcomes:
            self._outcomes[stage, particles] = [
                Outcome(kind="JobError", text="the launch was late; see the first test")
            ]
            self._outcomes[stage, particles] = self._pool.outcomes(weights_of_each, cases, world_size=4, timeout=120)
        index = list(rules).index(name)
        assert_true([outcome.get()[index] for outcome in self._outcomes[stage, particles]], cases[index])


@pytest.fixture(scope="module")
def launches(pool: Pool) -> Launches:
    return Launches(pool)


@pytest.mark.parametrize("stage", slow_but([0, 3], [0, 1, 2, 3]))
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_at_every_stage(launches: Launches, rule: str, stage: int) -> None:
    launches.assert_true(RULES, rule, stage, particles=2)


@pytest.mark.parametrize("stage", slow_but([2], [0, 2]))
@pytest.mark.parametrize("rule", RULES_FOR_FOUR)
def test_four_particles_of_one_rank(launches: Launches, rule: str, stage: int) -> None:
    launches.assert_true(RULES_FOR_FOUR, rule, stage, particles=4)


@pytest.mark.parametrize("rule", ["swarm", "line_search"])
@pytest.mark.parametrize("particles", [2, 4])
def test_what_is_compared_there_is_not_the_mean(rule: str, particles: int) -> None:
    """The guard and the search do choose something else at some sync point."""
    _, oracle = follow(replace(RULES[rule], particles=particles))
    assert set(oracle.winners) & {"weighted", *range(1, particles)}


@pytest.mark.parametrize(
    ("rule", "stage", "particles", "size"),
    slow_but(
        [("diloco", 3, 4, 1), ("pso-random", 1, 2, 1), ("pso-ring", 0, 3, 2)],
        [
            ("diloco", 3, 4, 1),
            ("pso-random", 1, 2, 1),
            ("swarm", 1, 3, 1),
            ("pso-ring", 3, 3, 2),
            ("pso-ring", 0, 3, 2),
        ],
    ),
)
def test_other_numbers_of_ranks(pool: Pool, rule: str, stage: int, particles: int, size: int) -> None:
    assert_truth(pool, replace(RULES_FOR_FOUR[rule], stage=stage, particles=particles), size)


ODD = [
    Case(stage=1, groups=3, sync_mode="pso"),
    Case(stage=2, groups=2, deepspeed={"zero_optimization": {"round_robin_gradients": True}}),
    Case(stage=3, groups=2, deepspeed={"zero_optimization": {"sub_group_size": 20}}),
    Case(stage=0, groups=3),
    Case(stage=2, accumulate=2),
    Case(stage=3, accumulate=2, sync_mode="pso"),
    Case(stage=2, swarm={"bucket_mb": 28 / 2**20}),  # seven fp32 numbers
    Case(stage=3, swarm={"bucket_mb": 4 / 2**20}),  # one
    Case(stage=0, swarm={"bucket_mb": 28 / 2**20}),
    Case(stage=2, interval=1, optimizer="SGD"),
    Case(stage=3, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
]


@pytest.mark.parametrize(
    "case",
    slow_but(ODD[::4], ODD),
    ids=lambda case: f"{case}-groups{case.groups}-accumulate{case.accumulate}",
)
def test_groups_buckets_and_micro_batches(pool: Pool, case: Case) -> None:
    assert_truth(pool, case, particle_size=2)


def masters_around_each_sync(cases: list[Case]) -> list[tuple[Any, list[Any]]]:
    """Of each case: masters at the beginning, and (masters before, losses, masters after) of each sync point."""
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        seen: list[Any] = []
        real = swarm.session.synchronizer.sync

        def sync(window: Any, step: int, swarm: Any = swarm, seen: list[Any] = seen, real: Any = real) -> Any:
            before = master_pieces(swarm)
            record = real(window, step)
            seen.append((before, swarm.last_losses, master_pieces(swarm)))
            return record

        swarm.session.synchronizer.sync = sync
        found.append((master_pieces(swarm), seen))
        train(case, engine)
    return found


@pytest.mark.parametrize("stage", slow_but([2], [0, 1, 2, 3]))
def test_in_half_precision_the_masters_follow_the_equations(pool: Pool, stage: int) -> None:
    """An oracle in fp32 cannot foresee training in bf16, but what a sync point does to the masters."""
    rules = ["diloco", "easgd", "nosync", "pso-per-tensor", "swarm", "line_search"]
    more = {"data_types": {"grad_accum_dtype": "fp32"}} if stage == 1 else {}  # another optimizer of DeepSpeed's
    cases = [replace(RULES[rule], stage=stage, precision="bf16", deepspeed=more) for rule in rules]
    like = {name: p.detach().numpy() for name, p in Net().named_parameters()}

    def whole(pieces: list[Any]) -> list[np.ndarray]:
        """Flat masters of each particle, from the pieces of all ranks."""
        models = [assemble(pieces[start : start + 2], like) for start in (0, 2)]
        return [np.concatenate([model[name].ravel() for name in like]).astype(np.float64) for model in models]

    for case, *ranks in zip(cases, *pool.run(masters_around_each_sync, cases), strict=True):
        start, start_of_1 = whole([rank[0] for rank in ranks])
        np.testing.assert_array_equal(start, start_of_1)
        oracle = make_oracle(case, start)
        assert len(ranks[0][1]) == 3
        for moments in zip(*(rank[1] for rank in ranks), strict=True):
            before, after = (whole([moment[k] for moment in moments]) for k in (0, 2))
            for mine, expected in zip(after, oracle.sync(before, list(moments[0][1])), strict=True):
                np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6, err_msg=str(case))
