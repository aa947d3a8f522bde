"""Who is left out of a sync point: against examples worked out by hand, and what must hold for any table."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.metrics.records import SyncRecord
from ds_pso.sync.fitness import ParticleReport
from ds_pso.sync.health import Limits, judge, warning

NAN, INF = math.nan, math.inf
LIMITS = Limits(loss=4.0, norm=10.0)


def healths(losses, norms=None, heard=None, highest=None):
    """Means of very many losses, unless told."""
    ones, many = [1.0] * len(losses), [10**9] * len(losses)
    return [
        ParticleReport(*values) for values in zip(losses, heard or many, norms or ones, highest or ones, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "out"),
    [
        ([1.0, 1.0], []),
        ([1.0, 4.0], []),  # exactly so many times is not more
        ([1.0, 4.1], [1]),
        ([4.1, 1.0], [0]),
        ([1.0, 5.0, 5.0], []),  # the median of 1 and 5 is 3: two of three are no exception
        ([1.0, 1.0, 5.0], [2]),
        ([1.0, 100.0, 1e6], [1, 2]),  # the worst goes first, and then 100 is judged by 1 alone
        ([1.0, 1.0, 100.0, 1e30], [2, 3]),
        ([7.0], []),
        ([0.0, 1e9], []),  # no ratio
        ([-1.0, 1e9], []),
        ([NAN, NAN], []),  # nobody has one
    ],
    ids=str,
)
def test_losses(losses, out):
    heard = [0 if math.isnan(loss) else 10**9 for loss in losses]
    assert sorted(judge(healths(losses, heard=heard), LIMITS)) == out


def buffers(odd=(), norms=()):
    pairs = zip(odd or [0] * len(norms), norms or [1.0] * len(odd), strict=True)
    return [ParticleReport(1.0, 9, 1.0, 1.0, odd_buffer_values=n, buffers_norm=norm) for n, norm in pairs]


@pytest.mark.parametrize(
    ("odd", "out"),
    [
        ([0, 0], []),
        ([0, 3], [1]),
        ([3, 3], []),  # by design: a mask that was filled after attach
        ([3, 4], [0, 1]),
        ([3, 3, 4], [0, 1, 2]),
        ([0, 3, 3], [1, 2]),
        ([3], [0]),  # nobody to compare with
    ],
    ids=str,
)
def test_buffers_that_are_not_finite(odd, out):
    found = judge(buffers(odd=odd), LIMITS)
    assert sorted(found) == out
    assert set(found.values()) <= {"its buffers are not finite"}


@pytest.mark.parametrize(
    ("norms", "out"),
    [([1.0, 1e4], []), ([1e9, 1e9], []), ([1e-9, 1.0], []), ([1.0, 1e20], [1]), ([1e9, 1e38, 1e9], [1])],
    ids=str,
)
def test_buffers_that_are_far_too_large(norms, out):
    """Statistics of unequal data may be; a flipped bit makes them huge."""
    assert list(judge(buffers(norms=norms), LIMITS)) == out
    assert judge(buffers(norms=norms), Limits(loss=4.0, norm=None)) == {}


@pytest.mark.parametrize(("highest", "out"), [(0.9, [1]), (1.1, []), (-3.0, []), (NAN, [])])
def test_small_losses_may_differ_much(highest, out):
    """0.5 is fifty times 0.01, and says little where the particles began at 1.1 or above."""
    assert list(judge(healths([0.01, 0.5, 0.01], highest=[highest] * 3), LIMITS)) == out


@pytest.mark.parametrize(("heard", "out"), [(1, []), (16, []), (64, [1])])
def test_a_mean_of_few_losses_is_mostly_chance(heard, out):
    assert list(judge(healths([0.1, 1.0], heard=[heard] * 2), LIMITS)) == out
    assert list(judge(healths([0.1, 17.0], heard=[heard] * 2), LIMITS)) == [1]


def test_data_may_be_unequally_hard():
    """Particle 1 began at a loss five times as high, and has come as far as the others."""
    assert judge(healths([0.9, 4.5, 0.9], highest=[1.0, 5.0, 1.0]), LIMITS) == {}


def test_an_easy_beginning_is_no_measure():
    """The first loss of particle 1 was a tenth of the others', by chance."""
    assert judge(healths([0.5, 0.6, 0.1], highest=[1.0, 0.1, 1.0]), LIMITS) == {}
    assert list(judge(healths([0.5, 4.0, 0.1], highest=[1.0, 0.1, 1.0]), LIMITS)) == [1]


@pytest.mark.parametrize(("spread", "allowed"), [(0.3, 0), (0.7, 0.0005), (1.0, 0.002)])
@pytest.mark.parametrize("heard", [1, 4, 16])
@pytest.mark.parametrize("particles", [2, 4])
def test_chance_alone_leaves_hardly_anybody_out(spread, allowed, heard, particles):
    """Losses of one micro-batch that vary by ``spread`` times their mean, which falls to a fifth; 3000 sync points."""
    rng, shape, found = np.random.default_rng(0), spread**-2, 0
    for _ in range(100):
        highest = rng.gamma(shape, 1 / shape, particles)
        for point in range(30):
            usual = 0.2 + 0.8 * math.exp(-point / 3)
            losses = rng.gamma(shape * heard, usual / (shape * heard), particles)
            found += len(judge(healths(losses, heard=[heard] * particles, highest=list(highest)), LIMITS))
            highest = np.maximum(highest, losses)
    assert found <= allowed * 3000


def test_an_old_loss_is_not_judged():
    """It is that of weights that have been replaced since."""
    assert judge(healths([1.0, 50.0], heard=[10**9, 0]), LIMITS) == {}


def test_norms_are_judged_first_and_then_the_losses_of_the_rest():
    table = healths([1.0, 100.0, 1e9, 9.0], norms=[5.0, 60.0, 5.0, 5.0])
    found = judge(table, LIMITS)
    assert found[1] == "its weights' norm 60 is 12 times the others' 5"
    assert found[3] == "its loss 9 is 9 times the highest so far, the others' 1", "particles 1 and 2 are no measure"
    assert sorted(found) == [1, 2, 3]


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (ParticleReport(NAN, 1, 1.0, 1.0, loss_is_finite=False), "its loss is not finite"),
        (ParticleReport(1.0, 1, INF, 1.0), "its weights are not finite"),
        (ParticleReport(INF, 1, NAN, 1.0, loss_is_finite=False), "its loss is and its weights are not finite"),
    ],
)
def test_what_is_not_finite(report, reason):
    assert judge([ParticleReport(1.0, 1, 1.0, 1.0), report], Limits(None, None)) == {1: reason}


def test_limits_can_be_off():
    table = healths([1.0, 1e9, 1.0], norms=[1.0, 1.0, 1e30])
    assert judge(table, Limits(None, None)) == {}
    assert list(judge(table, Limits(4.0, None))) == [1]
    assert list(judge(table, Limits(None, 10.0))) == [2]


numbers = st.one_of(st.floats(0, 1e30), st.sampled_from([NAN, INF, 0.0]))
rows = st.tuples(numbers, numbers, numbers).map(
    lambda t: ParticleReport(t[0], 9, *t[1:], loss_is_finite=math.isfinite(t[0]))
)
limits = st.one_of(st.none(), st.floats(1.001, 100))


@given(st.lists(rows, min_size=1, max_size=8), limits, limits)
def test_somebody_always_stays_and_each_who_goes_has_a_reason(table, loss, norm):
    reasons = judge(table, Limits(loss, norm))
    well = [i for i, report in enumerate(table) if report.loss_is_finite and math.isfinite(report.norm)]
    stay = [i for i in range(len(table)) if i not in reasons]
    assert bool(stay) == bool(well)
    assert set(stay) <= set(well)
    judged = {
        i: report.highest_loss
        for i, report in enumerate(table)
        if i in well and report.highest_loss > 0 and report.loss > 0
    }
    judged = {i: high for i, high in judged.items() if "norm" not in reasons.get(i, "")}
    usual = median(judged.values()) if judged else NAN
    grown = {i: table[i].loss / max(high, usual) for i, high in judged.items()}
    for i in set(stay) & set(grown):  # nobody who is better than one who stays has been left out for the loss
        assert not [j for j in grown if "its loss" in reasons.get(j, "") and 0 < grown[j] < grown[i]]
    assert all("\n" not in reason for reason in reasons.values())


def test_a_particle_is_warned_of_once_until_it_is_well_again():
    ill = SyncRecord(3, (1.0, NAN), (True, False), {"1": "its loss is not finite"})
    well = SyncRecord(4, (1.0, 1.0), (True, True))
    assert warning(ill, None) == (
        "sync point 3: left out, and restarted from the others if any is well: particle 1: its loss is not finite"
    )
    assert warning(ill, ill) is None
    assert warning(well, ill) is None
    assert warning(ill, well) is not None
