"""The fitness of a particle: the window of one rank, and what the ranks make of it together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.fitness import FitnessWindow, combine

NAN, INF = math.nan, math.inf


def test_a_window_adds_up_and_clears():
    window = FitnessWindow()
    assert (window.total, window.count) == (0.0, 0)
    for loss in (1.5, 2.5):
        window.add(torch.tensor(loss))
    assert (window.total, window.count) == (4.0, 2)
    window.clear()
    assert (window.total, window.count) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_made_in_fp64(dtype):
    window = FitnessWindow()
    window.add(torch.tensor(2.0**14, dtype=dtype))
    for _ in range(100):
        window.add(torch.tensor(2.0**-10, dtype=dtype))
    assert window.total == 2.0**14 + 100 * 2.0**-10


def test_a_window_holds_no_graph():
    window = FitnessWindow()
    weight = torch.ones((), requires_grad=True)
    window.add(weight * 2)
    assert not window._sum.requires_grad


def test_restore_goes_on_where_the_window_stood():
    straight, resumed = FitnessWindow(), FitnessWindow()
    for loss in (0.1, 0.2):
        straight.add(torch.tensor(loss))
    resumed.restore(*straight.state())
    for window in (straight, resumed):
        window.add(torch.tensor(0.3))
    assert (resumed.total, resumed.count) == (straight.total, straight.count)


@pytest.mark.parametrize(
    ("rows", "loss", "alive"),
    [
        ([(6.0, 2, 1.0)], 3.0, True),
        ([(6.0, 2, 1.0), (2.0, 2, 1.0)], 2.0, True),
        ([(6.0, 3, 1.0), (2.0, 1, 1.0)], 2.0, True),  # of micro-batches, not of ranks
        ([(6.0, 2, 1.0), (2.0, 2, 0.0)], 2.0, False),  # weights not finite on one rank
        ([(6.0, 2, 1.0), (NAN, 2, 1.0)], NAN, False),
        ([(INF, 2, 1.0), (1.0, 2, 1.0)], INF, False),
        ([(0.0, 0, 1.0), (0.0, 0, 1.0)], NAN, True),  # no loss was seen: nothing says it is ill
        ([(0.0, 0, 0.0)], NAN, False),
    ],
)
def test_combine(rows, loss, alive):
    assert combine(rows) == (pytest.approx(loss, nan_ok=True), alive)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 100)), min_size=1, max_size=6))
def test_the_loss_is_the_mean_over_all_micro_batches(rows):
    loss, alive = combine([(total, float(count), 1.0) for total, count in rows])
    assert loss == pytest.approx(math.fsum(t for t, _ in rows) / sum(c for _, c in rows), abs=1e-6)
    assert alive
