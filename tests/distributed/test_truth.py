"""Every rule under every way to shard the model computes what NumPy and plain torch compute.

So the result of a sync does not depend on the ZeRO stage, on the number of ranks in a particle,
on parameter groups, buckets or micro-batches.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from pool import Pool

from .jobs import Case, Weights, assert_close, assert_equal, swarm_of, train, working_weights
from .oracle import train_particles

RULES = {
    "local_sgd": Case(),
    "diloco": Case(sync_mode="diloco", steps=6),
    "diloco-no-momentum": Case(sync_mode="diloco", options={"outer_lr": 0.5, "outer_momentum": 0.0}),
    "pso": Case(sync_mode="pso"),
    "pso-inertia-cognitive": Case(sync_mode="pso", steps=6, options={"inertia": 0.4, "cognitive": 0.6, "social": 0.8}),
    "pso-all-time": Case(sync_mode="pso", steps=6, options={"best": "all_time", "inertia": 0.3}),
    "pso-random": Case(sync_mode="pso", steps=6, options={"randomness": "per_sync", "inertia": 0.2, "cognitive": 0.5}),
}


def final_weights(case: Case) -> Weights:
    with swarm_of(case) as (_, engine):
        train(case, engine)
        return working_weights(engine)


def assert_truth(pool: Pool, case: Case, particle_size: int) -> None:
    num_particles = int(case.particles)
    ranks = pool.run(final_weights, case, world_size=num_particles * particle_size)
    for particle, expected in enumerate(train_particles(case)):
        first, *mates = ranks[particle * particle_size : (particle + 1) * particle_size]
        assert_close(first, expected)
        for mate in mates:
            assert_equal(mate, first)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rule_at_every_stage(pool: Pool, rule: str, stage: int) -> None:
    assert_truth(pool, replace(RULES[rule], stage=stage), particle_size=2)


@pytest.mark.parametrize("rule", ["diloco", "pso-random"])
@pytest.mark.parametrize(("stage", "particles"), [(0, 2), (1, 4), (2, 2), (3, 4)])
def test_particles_of_one_rank(pool: Pool, rule: str, stage: int, particles: int) -> None:
    assert_truth(pool, replace(RULES[rule], stage=stage, particles=particles), particle_size=1)


@pytest.mark.parametrize(
    "case",
    [
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
    ],
    ids=lambda case: f"{case}-groups{case.groups}-accumulate{case.accumulate}",
)
def test_groups_buckets_and_micro_batches(pool: Pool, case: Case) -> None:
    assert_truth(pool, case, particle_size=2)
