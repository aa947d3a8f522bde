"""Alignment padding in the flat shards may hold anything: it reaches nobody, and nobody dies of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from variants import slow_but

from ds_pso.shards import find_shards
from ds_pso.swarm import Swarm
from ds_pso.sync.synchronizer import Synchronizer

from .jobs import Case, assemble, assert_equal, master_pieces, swarm_of, train, working_weights

CASES = [
    Case(stage=1, groups=2),
    Case(stage=2),
    Case(stage=2, precision="bf16", groups=3),
    Case(stage=1, precision="bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(stage=3, deepspeed={"zero_optimization": {"sub_group_size": 20}}),
    Case(stage=3, precision="bf16"),
]
RULES: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "diloco": {},
    "pso": {"inertia": 0.3, "cognitive": 0.5, "best": "all_time"},
}


def padding(swarm: Swarm) -> Iterator[Tensor]:
    """The parts of the shards that no parameter owns, found from what the parameters do own."""
    shards = swarm.session.synchronizer.parts.shards
    for index, tensor in enumerate(shards.tensors):
        free = torch.ones(tensor.numel(), dtype=torch.bool)
        for segment in shards.segments:
            if segment.shard == index:
                free[segment.shard_start : segment.shard_start + segment.numel] = False
        for position in free.nonzero().view(-1).tolist():
            yield tensor[position : position + 1]


def job(case: Case, poison: bool) -> Any:
    with swarm_of(case) as (swarm, engine):
        for step in range(case.steps):
            if poison:
                for index, hole in enumerate(padding(swarm)):
                    hole.fill_((float("nan"), 1e38, float("inf"))[(index + step) % 3])
            train(case, engine, range(step, step + 1))
        return sum(1 for _ in padding(swarm)), working_weights(engine), master_pieces(swarm), swarm.last_losses


@pytest.mark.parametrize(
    ("case", "sync_mode"),
    slow_but(
        [(case, "pso") for case in CASES[::3]],
        [
            *((case, "pso") for case in CASES),
            *((case, rule) for case in CASES[::4] for rule in ("local_sgd", "diloco")),
        ],
    ),
    ids=lambda value: f"{value}-groups{value.groups}" if isinstance(value, Case) else value,
)
def test_corrupted_padding_changes_nothing(pool: Pool, case: Case, sync_mode: str) -> None:
    case = replace(case, sync_mode=sync_mode, options=RULES[sync_mode], interval=1)
    clean = pool.run(job, case, False)
    assert sum(rank[0] for rank in clean) > 0, "this case has no padding to poison"
    for rank in clean:  # every real element has exactly one owner
        assemble([other[2] for other in clean[:2]], rank[1])
    for mine, expected in zip(pool.run(job, case, True), clean, strict=True):
        assert_equal(mine[1], expected[1])
        assert mine[3] == expected[3]


def state_made_of_poisoned_shards(case: Case) -> tuple[int, list[bool]]:
    """How many gaps were poisoned before the swarm was attached; and of what is remembered then, if it is finite."""
    with swarm_of(case, attach=False) as (swarm, engine):
        shards = find_shards(engine)
        for shard, start, stop in shards.padding:
            shards.tensors[shard][start:stop].fill_(float("nan"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Synchronizer, "start", lambda *arguments: None)  # it would take the state of particle 0
            swarm.attach(engine)
        updater = swarm.session.synchronizer.parts.updater
        remembered = [value for state in updater.state for value in state.values()]
        finite = [bool(torch.isfinite(tensor).all()) for tensor in [*remembered, *updater.differences.common]]
        return len(shards.padding), finite


def test_state_is_made_after_padding_was_cleared(pool: Pool) -> None:
    """A particle of an elastic swarm that starts alone keeps what it made, and gives it to those who join."""
    case = Case(stage=2, sync_mode="diloco", swarm={"wire": "int4"})
    ranks = pool.run(state_made_of_poisoned_shards, case)
    assert any(holes for holes, _ in ranks)
    assert all(finite and all(finite) for _, finite in ranks)
