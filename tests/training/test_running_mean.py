"""The mean of the losses since the last evaluation, of which training keeps none."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool

from ds_pso.training.running_mean import RunningMean


def test_the_mean_since_the_last_call():
    mean = RunningMean()
    assert math.isnan(mean.take())
    for values in ([1.0], [1.0, 2.0, 6.0], [0.5] * 100):
        for value in values:
            mean.add(torch.tensor(value, requires_grad=True))
        assert mean.take() == pytest.approx(sum(values) / len(values))
    assert math.isnan(mean.take())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_small_numbers_are_not_rounded_away(dtype):
    mean = RunningMean()
    mean.add(torch.tensor(1000.0, dtype=dtype))
    for _ in range(999):
        mean.add(torch.tensor(0.125, dtype=dtype))
    assert mean.take() == (1000 + 999 * 0.125) / 1000


def test_no_graph_and_no_loss_is_kept():
    before = scalars()
    mean, weight = RunningMean(), torch.ones(3, requires_grad=True)
    for _ in range(50):
        mean.add(weight.sum())
    assert scalars() <= before + 1


def scalars() -> int:
    """Tensors of one number that something holds."""
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) and item.dim() == 0 for item in gc.get_objects())


def scalars_after(arguments: list[str], steps: tuple[int, int]) -> list[int]:
    """Their number in the middle of the job, after each of these steps."""
    from ds_pso.swarm import Swarm
    from ds_pso.training.job import main

    found, real = {}, Swarm.should_stop

    def should_stop(swarm: Any) -> bool:
        if swarm.engine.global_steps in steps:
            found[swarm.engine.global_steps] = scalars()
        return real(swarm)

    Swarm.should_stop = should_stop
    assert main(arguments) == 0
    return [found[step] for step in steps]


def test_the_job_keeps_no_losses_between_evaluations(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a swarm of particles that learn to speak\n" * 400)
    arguments = ["--dataset", str(tmp_path / "words.txt"), "--output_dir", str(tmp_path / "run"), "--model"]
    arguments += ["llama:1x32", "--seq_length", "16", "--steps", "45", "--eval_every", "45"]
    ((early, late),) = pool.run(scalars_after, arguments, (4, 44), world_size=1, timeout=120)
    assert late <= early + 5
