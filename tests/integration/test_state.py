"""State in fewer bits: movements are rounded between sync points, and positions never."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pool import Pool
from variants import slow_but

from ds_pso.rules import RULES
from ds_pso.utils.offload import Offload, on_device

from .jobs import Case, Weights, one_after_the_other, train, working_weights
from .oracle import train_particles
from .test_truth import RULES as ALL
from .test_wire import RULES as ON_THE_WIRE
from .test_wire import check, watch

ROUGH = {"state_dtype": "bf16"}
CASES = {
    name: replace(ALL[name], steps=8, swarm=ALL[name].swarm | ROUGH)
    for name in ("diloco", "pso-inertia-cognitive", "pso-constriction")
}
CASES["swarm"] = Case(
    sync_mode="swarm", steps=8, swarm=ROUGH, options={**ALL["swarm"].options, "guard": False, "lr_spread": 1.0}
)


def weights_and_dtypes(cases: list[Case]) -> list[tuple[Weights, dict[str, torch.dtype]]]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine)
        state = swarm.session.synchronizer.parts.updater.state
        found.append((working_weights(engine), {key: value.dtype for kept in state for key, value in kept.items()}))
    return found


@pytest.mark.parametrize(("stage", "particles"), slow_but([(3, 2)], [(0, 2), (2, 2), (3, 2), (2, 4)]))
def test_every_rule_that_keeps_a_movement(pool: Pool, stage: int, particles: int) -> None:
    """As in NumPy, which rounds it, too; but for a few elements that were just between two values of bf16."""
    cases = [replace(case, stage=stage, particles=particles) for case in CASES.values()]
    ranks = pool.run(weights_and_dtypes, cases, world_size=4, timeout=120)
    for index, (name, case) in enumerate(zip(CASES, cases, strict=True)):
        size = 4 // particles
        exact = train_particles(replace(case, swarm={k: v for k, v in case.swarm.items() if k not in ROUGH}))
        for particle, expected in enumerate(train_particles(case)):
            found, dtypes = ranks[particle * size][index]
            apart, apart_from_fp32 = (
                np.concatenate([np.abs(found[key] - values[key]).ravel() for key in expected])
                for values in (expected, exact[particle])
            )
            assert apart.max() < 2e-3, name
            assert 10 * np.median(apart) < np.median(apart_from_fp32), name
            rough = RULES[case.sync_mode].rough_state
            for key, dtype in dtypes.items():
                assert dtype == (torch.bfloat16 if key in rough else torch.float32), f"{name} {key}"


def test_what_the_wire_leaves_over_is_rounded_and_hardly_less(pool: Pool) -> None:
    names = ("local_sgd", "easgd", "nosync")
    cases = [replace(ON_THE_WIRE[name], swarm=ON_THE_WIRE[name].swarm | ROUGH | {"wire": "int4"}) for name in names]
    ranks = pool.run(watch, cases, world_size=4, timeout=120)
    for index, (name, case) in enumerate(zip(names, cases, strict=True)):
        lives = [lives[index] for lives in ranks]
        residual = max(float(np.abs(m.residual_after).max(initial=0.0)) for life in lives for m in life.sync_points)
        check(name, case, lives, 2, atol=1e-6 + 2 * residual / 256)
        for life in lives:
            for sync_point in life.sync_points:
                kept = torch.from_numpy(sync_point.residual_after)
                assert torch.equal(kept.bfloat16().double(), kept)


def test_what_is_written_is_kept_and_nothing_else() -> None:
    x = torch.zeros(3)
    kept = {
        "moved": Offload(rough_dtype="bf16").keep(torch.full((3,), 1 + 2**-7), rough=True),
        "same": Offload(rough_dtype="bf16").keep(torch.full((3,), 1 + 2**-12)),
    }
    assert [t.dtype for t in kept.values()] == [torch.bfloat16, torch.float32]
    untouched = kept["moved"]._version
    with on_device(kept, x) as state:
        assert all(value.dtype == torch.float32 for value in state.values())
        assert (state["moved"] == 1 + 2**-7).all()
        assert (state["same"] == 1 + 2**-12).all()
        state["same"].mul_(2)
    assert kept["moved"]._version == untouched
    assert (kept["same"] == 2 + 2**-11).all()
    with on_device(kept, x) as state:
        state["moved"].add_(2**-10)
        state["moved"].mul_(4)
    assert (kept["moved"] == 4 * (1 + 2**-7)).all()  # to 8 significant bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_on_the_host_serves_a_shard_on_a_gpu() -> None:
    x = torch.randn(5, device="cuda")
    keeping = Offload(device="cpu", rough_dtype="bf16")
    kept = {"anchor": keeping.keep(x), "momentum": keeping.keep(torch.zeros_like(x), rough=True)}
    assert all(value.device.type == "cpu" and value.is_pinned() for value in kept.values())
    with on_device(kept, x) as state:
        assert torch.equal(state["anchor"], x)
        state["anchor"].add_(1)
        state["momentum"].fill_(0.5)
    assert torch.equal(kept["anchor"], (x + 1).cpu())
    assert (kept["momentum"] == 0.5).all()
