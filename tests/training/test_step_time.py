"""The time of a step: what is measured, and what of a config counts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.training import step_time
from ds_pso.training.step_time import shape_of_step


@given(st.integers(1, 10**7), st.integers(1, 64), st.integers(1, 8192))
def test_a_step_has_about_the_tokens_that_were_asked_for(tokens: int, micro_batch: int, longest: int) -> None:
    rows, length, micro_batches = shape_of_step(tokens, micro_batch, longest)
    assert 1 <= rows <= micro_batch
    assert 1 <= length <= min(longest, 1024)
    assert rows * length * micro_batches == pytest.approx(tokens, abs=rows * length / 2 + rows)


def test_shapes_by_hand() -> None:
    assert shape_of_step(4096, 2, 8192) == (2, 1024, 2)
    assert shape_of_step(512, 4, 2048) == (4, 128, 1)
    assert shape_of_step(512, 1, 128) == (1, 128, 4)


def test_the_median_of_the_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are not counted, and a step that something else has delayed does not count."""
    clock = 0.0
    seconds = iter([50.0, 20.0, 1.0, 3.0, 2.0, 9.0, 2.0])

    def step() -> None:
        nonlocal clock
        clock += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert step_time._time(step) == 2.0


def test_what_a_trainer_would_fill_in_is_left_out() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6}}, "gradient_clipping": "auto"}
    assert step_time._without_auto(config) == {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}
