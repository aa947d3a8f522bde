"""When particles sync: fixed, adaptive and wall-time schedules, as pure functions of what sync points show."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.sync.schedule import Observed, Schedule, ScheduleConfig, make_schedule
from ds_pso.utils.step_timer import StepTimer

CALM = Observed(drift=1e-9, step_s=0.1, held_up_s=0.0)


def schedule(interval: int = 4, total: int | None = None, **options: object) -> Schedule:
    return make_schedule(ScheduleConfig(**options), interval, total)


def run(plan: Schedule, steps: int, observed: list[Observed]) -> list[int]:
    """The steps after which the particles sync; each sync point shows the next observation, the last one for ever."""
    met = []
    for step in range(1, steps + 1):
        if plan.is_due(step):
            assert met == [] or plan.next_after(met[-1]) == step
            plan.begin(step)
            plan.observe(observed[min(len(met), len(observed) - 1)])
            met.append(step)
    return met


@pytest.mark.parametrize(
    ("interval", "warmup", "expected"),
    [(4, 0, [4, 8, 12]), (4, 3, [1, 2, 3, 4, 8, 12]), (4, 4, [1, 2, 3, 4, 8, 12]), (5, 6, [1, 2, 3, 4, 5, 6, 10])],
)
def test_a_fixed_interval_after_a_warmup(interval: int, warmup: int, expected: list[int]) -> None:
    plan = schedule(interval, 13, warmup_steps=warmup)
    assert run(plan, 13, [CALM]) == expected
    assert plan.count == len(expected)
    assert plan.last == expected[-1]
    assert plan.progress(plan.last) == 1


@given(st.integers(1, 20), st.integers(0, 30), st.integers(1, 60))
def test_of_a_fixed_interval_count_last_and_next_are_those_of_the_steps_that_are_due(interval, warmup, total):
    plan = schedule(interval, total, warmup_steps=warmup)
    due = [step for step in range(1, total + 1) if plan.is_due(step)]
    assert plan.count == len(due)
    assert plan.last == (due[-1] if due else 0)
    following = [step for step in range(1, total + 200) if plan.is_due(step)]
    for step in range(total):
        assert plan.next_after(step) == next(other for other in following if other > step)
    if due:
        assert [plan.progress(step) for step in due] == [step / due[-1] for step in due]


def test_progress_of_evenly_spaced_sync_points_is_their_share_to_the_bit():
    plan = schedule(7, 100)
    assert [plan.progress(7 * k) for k in range(1, 15)] == [k / 14 for k in range(1, 15)]


def test_a_length_that_nobody_knows():
    plan = schedule(4)
    assert (plan.count, plan.last, plan.progress(8)) == (None, None, None)
    assert schedule(8, 7).last == 0
    assert schedule(8, 7).progress(7) is None


def test_the_interval_doubles_while_the_particles_stay_together_up_to_its_limit():
    assert run(schedule(1, type="adaptive", max_interval=10), 40, [CALM]) == [1, 3, 7, 15, 25, 35]


def test_the_interval_is_halved_while_they_drift_apart_down_to_its_limit():
    wild = Observed(drift=1e9, step_s=0.1, held_up_s=0.0)
    assert run(schedule(16, type="adaptive", min_interval=3), 40, [wild]) == [16, 24, 28, 31, 34, 37, 40]


@pytest.mark.parametrize("begin", [1, 100])
def test_the_interval_settles_where_the_drift_is_what_it_shall_be(begin: int):
    """If particles drift by 0.001 a step, a drift of 0.02 takes 20 steps."""
    plan = schedule(begin, type="adaptive", drift=0.02, max_interval=200)
    step = 0
    for _ in range(20):
        apart, step = plan.next_after(step) - step, plan.next_after(step)
        plan.begin(step)
        plan.observe(Observed(drift=0.001 * apart, step_s=0.1, held_up_s=0.0))
    assert plan.next_after(step) - step == 20


@pytest.mark.parametrize(("share", "expected"), [(0.9, 18), (0.95, 38), (0.5, 2), (0.0, 1)])
def test_an_adaptive_interval_leaves_time_for_training(share: float, expected: int):
    """A sync point of 0.2 s, steps of 0.1 s: share = 0.1 n / (0.1 n + 0.2)."""
    plan = schedule(4, type="adaptive", compute_share=share)
    for step in range(1, 60):
        if plan.is_due(step):
            plan.begin(step)
            plan.observe(Observed(drift=1e9, step_s=0.1, held_up_s=0.2))
            last = step
    assert plan.next_after(last) - last == expected


def test_a_sync_point_where_nobody_is_alive_leaves_the_interval():
    plan = schedule(4, type="adaptive")
    assert run(plan, 12, [Observed(math.nan, 0.1, 0.0)]) == [4, 8, 12]


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, 10), (0.01, 1), (1e9, 1024), (0.34, 3)])
def test_a_wall_time_interval_is_what_the_slowest_makes_in_that_time(seconds: float, expected: int):
    plan = schedule(4, type="wall_time", seconds=seconds)
    assert run(plan, 4 + expected, [Observed(0.5, 0.1, 7.0)])[:2] == [4, 4 + expected]


@pytest.mark.parametrize("kind", ["adaptive", "wall_time"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_last_step_of_the_training_is_due_and_is_the_end_of_progress(kind: str, warmup: int):
    plan = schedule(4, 29, type=kind, warmup_steps=warmup)
    met = run(plan, 29, [CALM])
    assert met[:warmup] == list(range(1, warmup + 1))
    assert met[-1] == 29
    assert plan.count is None
    assert [plan.progress(step) for step in (0, 29)] == [0, 1]
    assert plan.next_after(29) > 29


@pytest.mark.parametrize("kind", ["adaptive", "wall_time"])
def test_a_sync_point_out_of_turn_decides_nothing_and_begins_the_interval_anew(kind: str):
    """The script asked for it, after three steps of eight or right after another: its drift is not that of eight."""
    plan = schedule(8, type=kind)
    for step in (3, 3, 4):
        plan.begin(step)
        plan.observe(Observed(drift=1e-6, step_s=1e-6, held_up_s=1.0))
        assert plan.next_after(step) == step + 8


def test_the_time_of_a_step_may_not_be_known():
    unknown = Observed(drift=0.1, step_s=math.nan, held_up_s=1.0)
    assert run(schedule(4, type="adaptive", drift=0.1), 12, [unknown]) == [4, 8, 12]
    assert run(schedule(4, type="wall_time"), 12, [unknown]) == [4, 8, 12]


def test_a_fixed_schedule_is_followed_by_another_from_the_last_sync_point_on():
    fixed, plan = schedule(8), schedule(8, type="adaptive")
    fixed.begin(16)
    plan.load_state_dict(fixed.state_dict())
    assert [plan.is_due(step) for step in (19, 23, 24)] == [False, False, True]


def test_a_step_timer_tells_steps_from_what_else_happens():
    now, timer = 150.0, StepTimer()  # after data, compilation and whatever else comes first
    timer.tick(now)
    assert timer.take() == 0.0
    for extra in (0, 0, 30, 0, 0):  # an evaluation in the third
        now += 20 + 1 + extra
        timer.tick(now, spent_s=20)  # in a sync
    assert timer.take() == 1.0
    assert timer.take() == 0.0


def test_a_varying_interval_goes_on_where_it_was_saved():
    one, other = (schedule(2, type="adaptive", warmup_steps=1) for _ in range(2))
    seen = [Observed(drift, 0.1, 0.0) for drift in (1, 0.013, 0.011, 0.03, 0.01)]
    assert run(one, 6, seen)
    other.load_state_dict(one.state_dict())
    assert [one.next_after(6), one.state_dict()] == [other.next_after(6), other.state_dict()]


def test_saved_with_a_fixed_interval_resumed_with_another():
    plan = schedule(4, type="adaptive")
    plan.load_state_dict(schedule(4).state_dict())
    assert plan.next_after(0) == 4
    fixed = schedule(4)
    fixed.load_state_dict(plan.state_dict())
    assert fixed.next_after(5) == 8
