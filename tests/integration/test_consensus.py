"""Inside ``swarm.consensus()`` the engine holds the model that export would write; outside nothing has happened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
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
    optimizer_state,
    particle_batch,
    swarm_of,
    train,
    working_weights,
)
from .oracle import follow
from .test_publish import OFFLOAD_ALL, cast

BASE = Case(steps=3)  # a sync point, and a step apart
RULES = {
    "pso": replace(BASE, sync_mode="pso", options={"inertia": 0.3, "cognitive": 0.5}),
    "easgd": replace(BASE, sync_mode="easgd"),
}
STAGES = {
    "zero0-batch-norm": {"stage": 0, "batch_norm": True},
    "zero2-batch-norm": {"stage": 2, "batch_norm": True},
    "zero3-batch-norm": {"stage": 3, "batch_norm": True},
    "zero0-bf16": {"stage": 0, "precision": "bf16"},
    "zero1-bf16-fp32-accumulation": {
        "stage": 1,
        "precision": "bf16",
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "zero3-bf16-offload": {"stage": 3, "precision": "bf16", "deepspeed": {"zero_optimization": OFFLOAD_ALL}},
}


def snapshot(swarm: Any, engine: Any) -> list[Weights]:
    """Everything that training goes on from."""
    synchronizer = swarm.session.synchronizer
    return [
        working_weights(engine),
        {f"{i}": t.numpy().copy() for i, t in enumerate(synchronizer.parts.shards.tensors)},
        {f"{i}.{k}": v.numpy().copy() for i, s in enumerate(synchronizer.parts.updater.state) for k, v in s.items()},
        optimizer_state(engine),
        {"random": torch.get_rng_state().numpy().copy()},
        {
            "numbers": np.array(
                [swarm.totals.count, swarm.totals.bytes_received, engine.global_steps, swarm.session.window.count]
            )
        },
    ]


def look_inside(cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine)
        result: dict[str, Any] = {
            "masters": master_pieces(swarm),
            "losses": swarm.last_losses,
            "before": snapshot(swarm, engine),
        }
        states = swarm.session.synchronizer.parts.updater.state
        if "center" in states[0]:
            shards = [state["center"] for state in states]
            segments = swarm.session.synchronizer.parts.shards.segments
            result["center"] = [
                (s.name, s.param_start, shards[s.shard][s.shard_start : s.shard_start + s.numel].numpy().copy())
                for s in segments
            ]
        for which in ("consensus", "best"):
            with swarm.consensus(which):
                engine.eval()
                result[which] = working_weights(engine)
                x, _ = particle_batch(0, 99)
                with torch.no_grad():
                    result[which + " output"] = engine(x.to(case.dtype)).float().numpy()
                engine.train()
            result[which + " left"] = snapshot(swarm, engine)
        train(case, engine, range(3, 6))
        result["later"] = snapshot(swarm, engine)
        found.append(result)
    return found


def without_looking(cases: list[Case]) -> list[list[Weights]]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine, range(6))
        found.append(snapshot(swarm, engine))
    return found


def forward(case: Case, weights: Weights) -> np.ndarray:
    model = Net(case.batch_norm)
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})
    x, _ = particle_batch(0, 99)
    with torch.no_grad():
        return model.to(case.dtype).eval()(x.to(case.dtype)).float().numpy()


@pytest.mark.parametrize("name", slow_but(("zero2-batch-norm",), STAGES))
def test_inside_is_the_model_and_outside_nothing_changed(pool: Pool, name: str) -> None:
    cases = [replace(case, **STAGES[name]) for case in RULES.values()]
    ranks = pool.run(look_inside, cases)
    undisturbed = pool.run(without_looking, cases)
    for number, (rule, case) in enumerate(zip(RULES, cases, strict=True)):
        found = [rank[number] for rank in ranks]
        working = found[0]["consensus"]
        buffers = [key for key in working if key.startswith(("norm.running", "norm.num"))]
        like = {key: value for key, value in working.items() if key not in buffers}
        masters = [assemble([rank["masters"] for rank in found[start : start + 2]], like) for start in (0, 2)]
        best = int(np.argmin(found[0]["losses"]))
        model = {key: (masters[0][key] + masters[1][key]) / 2 for key in like}
        if rule == "easgd":
            model = assemble([rank["center"] for rank in found[:2]], like)
        for which, truth, of in (("consensus", model, (0, 1)), ("best", masters[best], (best, best))):
            for position, rank in enumerate(found):
                assert_close({key: rank[which][key] for key in like}, cast(truth, case.dtype), rtol=1e-6, atol=1e-7)
                peers = [found[2 * particle + position % 2]["before"][0] for particle in of]
                for buffer in buffers:
                    if "num_batches" not in buffer:
                        mean = (peers[0][buffer] + peers[1][buffer]) / 2
                        np.testing.assert_allclose(rank[which][buffer], mean, rtol=1e-6, err_msg=buffer)
                expected = forward(case, rank[which])
                np.testing.assert_allclose(rank[which + " output"], expected, rtol=1e-5, atol=1e-6)
        for rank, truth in zip(found, [rank[number] for rank in undisturbed], strict=True):
            for which in ("consensus", "best"):
                for mine, before in zip(rank[which + " left"], rank["before"], strict=True):
                    assert_equal(mine, before)
            for mine, expected in zip(rank["later"], truth, strict=True):
                assert_equal(mine, expected)
        assert any((masters[0][key] != masters[1][key]).any() for key in like), "the particles never went apart"


def leave_by_an_error(case: Case) -> list[list[Weights]]:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))
        before = snapshot(swarm, engine)
        with pytest.raises(ZeroDivisionError), swarm.consensus():
            raise ZeroDivisionError
        return [before, snapshot(swarm, engine)]


def test_an_error_inside_gives_everything_back(pool: Pool) -> None:
    for before, after in pool.run(leave_by_an_error, Case(stage=3, sync_mode="easgd")):
        for mine, expected in zip(after, before, strict=True):
            assert_equal(mine, expected)


def nothing_to_agree_on(case: Case) -> Any:
    with swarm_of(case) as (swarm, engine):
        train(case, engine)
        before = working_weights(engine)
        with swarm.consensus(), swarm.consensus("best"):
            return before, working_weights(engine)


@pytest.mark.parametrize("sync_mode", ["allreduce", "easgd"])
def test_one_particle_is_the_model(pool: Pool, sync_mode: str) -> None:
    for before, inside in pool.run(nothing_to_agree_on, Case(particles=1, sync_mode=sync_mode), world_size=2):
        assert_equal(inside, before)


def losses_apart_and_together(case: Case) -> Any:
    """What ``gather`` says of each particle's own loss, and of the centre's."""
    with swarm_of(case) as (swarm, engine):
        train(case, engine)
        probe = swarm.session.synchronizer.parts.assessor.probe
        with torch.no_grad():
            apart = swarm.gather(float(probe(50)))
            with swarm.consensus():
                return apart, swarm.gather(float(probe(50)))


def test_gathered_losses_are_those_of_the_particles(pool: Pool) -> None:
    case = Case(stage=2, sync_mode="easgd", steps=6, probe=True, options={"beta": 0.8})
    weights, oracle = follow(case)
    flat = [np.concatenate([w.ravel() for w in particle.values()]) for particle in weights]
    score = oracle.problem.score
    for apart, together in pool.run(losses_apart_and_together, case):
        np.testing.assert_allclose(apart, [score(w, 50) for w in flat], rtol=1e-5)
        np.testing.assert_allclose(together, [score(oracle.model([]), 50)] * 2, rtol=1e-5)
