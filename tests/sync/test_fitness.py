"""The fitness of a particle: the window of one rank, and what the ranks make of it together."""

import math
from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integration.jobs import Case, build_engine, config, rank_batches
from torch import nn

import ds_pso
from ds_pso.sync.fitness import FitnessWindow, ParticleReport, RankReport

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
        straight.steps += 1
    resumed.restore(*straight.state())
    for window in (straight, resumed):
        window.add(torch.tensor(0.3))
    assert resumed.state() == straight.state()
    assert resumed.first == pytest.approx(0.1)


@pytest.mark.parametrize("first", [None, 7.0])
def test_what_was_taken_is_given_back(first):
    """A sync in the background that came to nothing: its losses, and its steps, count again."""
    window = FitnessWindow()
    window.add(torch.tensor(2.0))
    window.steps = 1
    window.give_back(3.0, 2, 5, first)
    assert window.state() == (5.0, 3, 6, first or 2.0)


def test_a_first_loss_that_is_no_number_is_one():
    """And stays the first when it is restored; no loss at all does not."""
    window, empty = FitnessWindow(), FitnessWindow()
    window.restore(*(NAN, 1, 1, NAN))
    empty.restore(*FitnessWindow().state())
    for one in (window, empty):
        one.add(torch.tensor(1.0))
    assert math.isnan(window.first)
    assert empty.first == 1.0


@pytest.mark.parametrize(
    ("rows", "loss", "num_losses", "norm", "finite"),
    [
        ([(6.0, 2, 9.0, 1.0)], 3.0, 2, 3, True),
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, 16.0, 1.0)], 2.0, 4, 5, True),
        ([(6.0, 3, 9.0, 1.0), (2.0, 1, 16.0, 1.0)], 2.0, 4, 5, True),  # of micro-batches, not of ranks
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, NAN, 1.0)], 2.0, 4, NAN, True),  # weights not finite on one rank
        ([(6.0, 2, 9.0, 1.0), (2.0, 2, INF, 1.0)], 2.0, 4, INF, True),
        ([(6.0, 2, 9.0, 1.0), (NAN, 2, 16.0, 1.0)], NAN, 4, 5, False),
        ([(INF, 2, 9.0, 1.0), (1.0, 2, 16.0, 1.0)], INF, 4, 5, False),
        ([(0.0, 0, 9.0, 1.0), (0.0, 0, 16.0, 1.0)], NAN, 0, 5, True),  # no loss was seen: nothing says it is ill
        ([(0.0, 0, NAN, 1.0)], NAN, 0, NAN, True),
    ],
)
def test_ranks_report_together(rows, loss, num_losses, norm, finite):
    report = ParticleReport.combined(rows, steps=7)
    assert (report.highest_loss, report.steps, report.loss_is_finite) == (1.0, 7, finite)
    assert (report.loss, report.num_losses, report.norm) == pytest.approx((loss, num_losses, norm), nan_ok=True)


def test_the_slowest_rank_sets_the_pace():
    ranks = [RankReport(1.0, 1, 1.0, 1.0, 0.5, 3.0), RankReport(1.0, 1, 1.0, 1.0, 0.25, 4.0)]
    report = ParticleReport.combined([astuple(rank) for rank in ranks], steps=1)
    assert (report.step_s, report.held_up_s) == (0.5, 4.0)


def test_ranks_look_at_the_model_together():
    ranks = [RankReport(1.0, 1, 1.0, 1.0, 0, 0, 9.0, 2, 7.0), RankReport(1.0, 1, 1.0, 1.0, 0, 0, 16.0, 1, -8.0)]
    report = ParticleReport.combined([astuple(rank) for rank in ranks], steps=1)
    assert (report.buffers_norm, report.odd_buffer_values) == (5.0, 3)
    assert report.frozen < 0
    same = ParticleReport.combined([astuple(replace(rank, frozen=abs(rank.frozen))) for rank in ranks], steps=1)
    assert same.frozen == -report.frozen
    assert ParticleReport.combined([astuple(replace(rank, frozen=0.0)) for rank in ranks], steps=1).frozen == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 100)), min_size=1, max_size=6))
def test_the_loss_is_the_mean_over_all_micro_batches(rows):
    report = ParticleReport.combined([(total, float(count), 1.0, 1.0) for total, count in rows], steps=1)
    assert report.loss == pytest.approx(math.fsum(t for t, _ in rows) / sum(c for _, c in rows), abs=1e-6)
    assert report.num_losses == sum(count for _, count in rows)


reports = st.builds(
    ParticleReport,
    loss=st.floats(0, 1e6),
    num_losses=st.integers(0, 1000),
    norm=st.floats(0, 1e6) | st.just(INF),
    highest_loss=st.floats(0, 1e6),
    steps=st.integers(0, 1000),
    step_s=st.floats(0, 100),
    held_up_s=st.floats(0, 100),
    samples=st.integers(0, 2**48 - 1).map(float),
    buffers_norm=st.floats(0, 1e30),
    odd_buffer_values=st.integers(0, 1000),
    frozen=st.integers(-(2**52), 2**52).map(float),
    trained=st.integers(0, 2**40),
)


@given(reports)
def test_a_report_travels_as_a_row(report):
    assert len(report.to_row()) == 12
    assert ParticleReport.from_row(report.to_row()) == report


def test_what_a_row_cannot_hold_as_a_number():
    diverged = ParticleReport.from_row(ParticleReport(INF, 3, 1.0, 2.0, loss_is_finite=False).to_row())
    assert not diverged.loss_is_finite
    assert not diverged.recovers
    recovering = ParticleReport.from_row(ParticleReport.of_recovering().to_row())
    assert recovering.recovers
    assert recovering.loss_is_finite
    assert (recovering.num_losses, recovering.steps, recovering.held_up_s) == (0, 0, INF)
    absent = ParticleReport.from_row([NAN] * 12)
    assert (absent.num_losses, absent.steps, absent.recovers) == (0, 0, False)


def accumulate_losses(case, divides):
    """Losses of the micro-batches of each particle, and the fitness that was made of them, with two particles."""

    def live(swarm):
        engine, losses = swarm.attach(build_engine(case, swarm.ds_config)), []
        for step in range(case.steps):
            for x, y in rank_batches(case, swarm.particle, 0, 1, step):
                loss = nn.functional.mse_loss(engine(x), y)
                losses.append(loss.item())
                if divides:  # as the HF Trainer does
                    engine.backward(loss / case.accumulate, scale_wrt_gas=False)
                else:
                    engine.backward(loss)
                engine.step()
        return losses, swarm.last_losses

    return ds_pso.simulate(config(case, 1), live)


@pytest.mark.parametrize("divides", [False, True])
def test_a_loss_counts_as_that_of_a_micro_batch_whoever_divides_it(pool, divides):
    """By the accumulation steps: else the fitness would depend on them, and on who runs the loop."""
    (particles,) = pool.run(accumulate_losses, Case(stage=0, accumulate=4, interval=4, seed=1), divides, world_size=1)
    means = [sum(losses) / len(losses) for losses, _ in particles]
    for losses, fitness in particles:
        assert len(losses) == 16
        assert fitness == pytest.approx(means, rel=1e-6)
