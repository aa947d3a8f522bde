"""The learning rate by its formula, through DeepSpeed's own lookup, and after a restart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.errors import ConfigError
from ds_pso.session import lr_schedule
from ds_pso.session.lr_schedule import WarmupHoldDecayLR

LOW, HIGH = 0.001, 0.5


def make_optimizer(num_groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)], lr=9.0)


def make_schedule(total: int, warmup: int, optimizer: Any = None, **params: Any) -> WarmupHoldDecayLR:
    rates = {"warmup_min_lr": LOW, "warmup_max_lr": HIGH, **params}
    return WarmupHoldDecayLR(optimizer or make_optimizer(), total, warmup_num_steps=warmup, **rates)


def rates(schedule: WarmupHoldDecayLR, num_steps: int) -> list[float]:
    """The optimizer's rate after each of so many steps."""
    taken = []
    for _ in range(num_steps):
        schedule.step()
        taken.append(schedule.optimizer.param_groups[0]["lr"])
    return taken


def formula(t: int, total: int, warmup: int, decay: int) -> float:
    """The docstring's."""
    if t < warmup:
        gamma = t / warmup
    elif t < total - decay:
        gamma = 1.0
    else:
        gamma = max(0.0, (total - t) / decay)
    return LOW + gamma * (HIGH - LOW)


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(10, 60), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_follows_the_formula(warmup, total, ratio):
    expected = [formula(t, total, warmup, max(1, round(ratio * total))) for t in range(total + 3)]
    assert rates(make_schedule(total, warmup, decay_ratio=ratio), total + 3) == pytest.approx(expected)


def test_the_shape_by_example():
    values = rates(make_schedule(total=10, warmup=2, decay_ratio=0.4, warmup_min_lr=0.0, warmup_max_lr=1.0), 12)
    assert values == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_the_default_decays_in_the_last_tenth():
    values = rates(make_schedule(total=100, warmup=5), 100)
    assert [t for t, value in enumerate(values) if value == HIGH] == list(range(5, 91))


def test_a_logarithmic_warm_up_is_deepspeeds():
    mine = make_schedule(20, 8, warmup_type="log")
    theirs = lr_schedules.WarmupLR(make_optimizer(), LOW, HIGH, 8, "log")
    for _ in range(8):
        theirs.step()
        mine.step()
        assert mine.get_last_lr() == theirs.get_last_lr()


def test_no_warm_up_is_the_shortest_that_deepspeed_has():
    """The Trainer of older transformers fills in 0, which DeepSpeed refuses."""
    assert rates(make_schedule(20, 0), 20) == rates(make_schedule(20, 1), 20)
    with pytest.raises(ValueError, match="warmup_num_steps"):
        make_schedule(20, -1)


def test_before_the_first_step_the_rate_is_the_lowest():
    optimizer = make_optimizer()
    schedule = make_schedule(10, 2, optimizer)
    assert optimizer.param_groups[0]["lr"] == LOW
    assert schedule.get_last_lr() == [LOW]


def test_every_group_has_its_own_rates():
    optimizer = make_optimizer(2)
    schedule = make_schedule(10, 2, optimizer, warmup_min_lr=[0.0, 0.0], warmup_max_lr=[1.0, 3.0])
    rates(schedule, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 3.0]


def test_deepspeed_finds_it_by_name(monkeypatch):
    monkeypatch.delattr(lr_schedules, "WarmupHoldDecayLR", raising=False)
    lr_schedule.register()
    found = lr_schedules.WarmupHoldDecayLR  # as DeepSpeedEngine does, with getattr
    params = {"total_num_steps": 20, "warmup_num_steps": 4, "warmup_max_lr": 0.1, "decay_ratio": 0.5}
    schedule = found(make_optimizer(), **params)
    assert rates(schedule, 8)[-1] == 0.1


@pytest.mark.parametrize("stop", [1, 3, 10, 18])
def test_a_restart_goes_on_where_it_stopped(stop):
    straight = rates(make_schedule(20, 4, decay_ratio=0.3), 22)
    before, after = make_schedule(20, 4, decay_ratio=0.3), make_schedule(20, 4, decay_ratio=0.3)
    first = rates(before, stop)
    after.load_state_dict(before.state_dict())
    assert first + rates(after, 22 - stop) == straight


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_bad_decay_ratio_is_a_config_error(ratio):
    with pytest.raises(ConfigError) as caught:
        make_schedule(10, 2, decay_ratio=ratio)
    assert str(caught.value) == f"scheduler.params.decay_ratio = {ratio!r}: must lie in (0, 1]"
