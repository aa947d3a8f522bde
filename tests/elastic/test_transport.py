"""An elastic swarm in which nothing happens is the static one, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from integration.jobs import Case, assert_equal, swarm_of, train, working_weights
from pool import Pool
from variants import slow_but

from elastic.swarms import elastic, lighthouse, places

CASES = [
    Case(seed=3, sync_mode="diloco"),
    Case(seed=3, interval=2, steps=6, swarm={"delay": 1}),
    Case(seed=3, stage=3, sync_mode="pso"),
    Case(seed=3, sync_mode="diloco", particles=1),
]


def job(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        train(case, engine)
        swarm.finish_pending()
        return working_weights(engine), records, engine.global_steps


@pytest.mark.parametrize("case", slow_but(CASES[1:2], CASES), ids=str)
def test_like_the_static_swarm(pool: Pool, case: Case) -> None:
    particles = int(case.particles)
    static = pool.run(job, case, world_size=2 * particles)
    with lighthouse() as url:
        ranks = pool.run(job, elastic(case), world_size=2 * particles, env=places(url, particles, 2))
    for (expected, records, steps), (found, others, made) in zip(static, ranks, strict=True):
        assert_equal(found, expected)
        assert [r["losses"] for r in others] == [r["losses"] for r in records]
        assert [r["staleness"] for r in others] == [r["staleness"] for r in records]
        assert np.shape(others) == (case.steps // case.interval,)
        assert made == steps == case.steps
