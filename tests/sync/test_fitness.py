"""The fitness of a particle: the window of one rank, and what the ranks make of it together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.sync.fitness import FitnessWindow, combine

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


def test_the_first_loss_stays_known():
    window = FitnessWindow()
    assert math.isnan(window.first)
    for loss in (1.5, 2.5):
        window.add(torch.tensor(loss))
        window.clear()
    assert window.first == 1.5


def test_restore_goes_on_where_the_window_stood():
    straight, resumed = FitnessWindow(), FitnessWindow()
    for loss in (0.1, 0.2):
        straight.add(torch.tensor(loss))
    resumed.restore(*straight.state())
    for window in (straight, resumed):
        window.add(torch.tensor(0.3))
    assert (resumed.total, resumed.count) == (straight.total, straight.count)


@pytest.mark.parametrize(
    ("rows", "loss", "heard", "norm"),
    [
        ([(6.0, 2, 9.0, 1.0)], 3.0, 2, 3),
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, 16.0, 1.0)], 2.0, 4, 5),
        ([(6.0, 3, 9.0, 1.0), (2.0, 1, 16.0, 1.0)], 2.0, 4, 5),  # of micro-batches, not of ranks
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, NAN, 1.0)], 2.0, 4, NAN),  # weights not finite on one rank
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, INF, 1.0)], 2.0, 4, INF),
        ([(6.0, 2, 9.0, 1.0), (NAN, 2, 16.0, 1.0)], NAN, -1, 5),
        ([(INF, 2, 9.0, 1.0), (1.0, 2, 16.0, 1.0)], INF, -1, 5),
        ([(0.0, 0, 9.0, 1.0), (0.0, 0, 16.0, 1.0)], NAN, 0, 5),  # no loss was seen: nothing says it is ill
        ([(0.0, 0, NAN, 1.0)], NAN, 0, NAN),
    ],
)
def test_combine(rows, loss, heard, norm):
    health = combine(rows)
    assert health.highest == 1.0
    assert (health.loss, health.heard, health.norm) == pytest.approx((loss, heard, norm), nan_ok=True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 100)), min_size=1, max_size=6))
def test_the_loss_is_the_mean_over_all_micro_batches(rows):
    health = combine([(total, float(count), 1.0, 1.0) for total, count in rows])
    assert health.loss == pytest.approx(math.fsum(t for t, _ in rows) / sum(c for _, c in rows), abs=1e-6)
    assert health.heard == sum(count for _, count in rows)
