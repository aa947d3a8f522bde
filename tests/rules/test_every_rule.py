"""What every registered rule must keep, whatever its options."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_pso.rules import RULES, Place, SyncPoint

from .simulation import Simulation, any_rule, histories, losses, make_rule, relaxed, seeds, sync_points


def bits(tensor):
    """Comparable to the last bit, NaN included."""
    return tensor.view(torch.int32)


def scattered(rule, sync_point, seed=0, numel=3, dead=math.nan):
    """Particles in random places, the dead ones at NaN or elsewhere, after a sync point with this fitness."""
    fitness, alive = sync_point
    swarm = Simulation(rule, torch.zeros(numel), len(alive))
    generator = torch.Generator().manual_seed(seed)
    for x, living in zip(swarm.x, alive, strict=True):
        x += torch.randn(numel, generator=generator) if living else dead
    swarm.sync(fitness, alive)
    return swarm


@relaxed
@given(any_rule, st.integers(1, 5).flatmap(sync_points), seeds)
def test_a_plan_can_be_carried_out(rule, sync_point, seed):
    _, alive = sync_point
    state = rule.init_state(torch.zeros(3))
    for plan in scattered(rule, sync_point, seed).plans:
        assert plan.send == "x" or plan.send in state
        assert plan.alive == tuple(alive)
        if plan.receive == "mean":
            assert sum(plan.weights) == pytest.approx(1.0)
            assert all(w == 0 for w, living in zip(plan.weights, alive, strict=True) if not living)
        elif plan.receive == "one":
            assert all(alive[source] for source in plan.sources), "a dead particle would send NaN"
        assert all(factor > 0 and math.isfinite(factor) for factor in plan.lr_factors)
        assert not plan.score or rule.uses_probe
        json.dumps(plan.note)  # goes to metrics.jsonl
    assert rule.model_in == "x" or rule.model_in in state


@relaxed
@given(any_rule, st.integers(2, 5).flatmap(lambda n: st.tuples(sync_points(n), st.integers(2, 6))), seeds)
def test_a_memory_serves_another_number_of_particles(rule, sync_point_and_more, seed):
    """A checkpoint may be loaded on other numbers of particles: lists with an entry for each change their length."""
    sync_point, more = sync_point_and_more
    swarm = scattered(rule, sync_point, seed)
    count = len(swarm.x)
    lists = {name for name, value in swarm.memory.items() if isinstance(value, list | tuple)}
    assert lists <= rule.memory_of_particles, "a list of something else, or one that is not named"
    memory = {
        name: [value[i % count] for i in range(more)] if name in rule.memory_of_particles else value
        for name, value in swarm.memory.items()
    }
    fitness = tuple(0.5 + i for i in range(more))
    point = SyncPoint(1, fitness, (True,) * more, total=20, steps=(100,) * more)
    plan = rule.plan(point, memory)
    while plan.score:
        plan = rule.proceed(plan, fitness)
    assert {len(plan.alive), len(plan.factors or plan.alive), len(plan.lr_factors or plan.alive)} == {more}


@relaxed
@given(any_rule, st.integers(1, 4).flatmap(sync_points), st.integers(0, 1000))
def test_a_plan_depends_on_its_arguments_alone(rule, sync_point, index):
    point = SyncPoint(index, tuple(sync_point[0]), tuple(sync_point[1]), total=2000)
    twin = type(rule)(rule.options, seed=rule.seed)
    twin.plan(replace(point, index=index + 1), {})  # other calls in between change nothing
    assert rule.plan(point, {}) == twin.plan(point, {})


@settings(relaxed, max_examples=200)
@given(
    any_rule,
    st.integers(2, 4).flatmap(sync_points),
    st.sampled_from([150, 33, 8, 1, 0]),
    st.integers(1, 6),
    seeds,
)
def test_updating_in_pieces_equals_updating_at_once(rule, sync_point, numel, num_pieces, seed):
    rng = np.random.default_rng(seed)

    def noise():
        return torch.from_numpy(rng.normal(size=numel).astype(np.float32))

    edges = [0, *sorted(rng.integers(0, numel + 1, size=num_pieces)), numel]
    for plan, (particle, living) in itertools.product(
        scattered(rule, sync_point, seed).plans, enumerate(sync_point[1])
    ):
        place = Place(particle, "weight")
        x, arrived = noise() if living else torch.full((numel,), math.nan), noise()
        state = {name: noise() for name in rule.init_state(x)}
        x_cut, state_cut = x.clone(), {name: value.clone() for name, value in state.items()}

        def received(x, cut=slice(None), plan=plan, arrived=arrived):
            return x if plan.receive == "nothing" else arrived.clone()[cut]

        rule.before_exchange(x, state, plan, place)
        rule.update(x, received(x), state, plan, place)
        for start, stop in itertools.pairwise(edges):
            piece = {name: value[start:stop] for name, value in state_cut.items()}
            rule.before_exchange(x_cut[start:stop], piece, plan, place)
            rule.update(x_cut[start:stop], received(x_cut[start:stop], slice(start, stop)), piece, plan, place)
        assert torch.equal(bits(x), bits(x_cut))
        assert state.keys() == state_cut.keys()
        assert all(torch.equal(bits(value), bits(state_cut[name])) for name, value in state.items())


@settings(relaxed, max_examples=200)
@given(any_rule, st.integers(2, 5).flatmap(sync_points), seeds)
def test_what_a_rule_says_of_itself_is_true(rule, sync_point, seed):
    swarm = scattered(rule, sync_point, seed)
    if rule.ends_equal:
        assert (bits(torch.from_numpy(swarm.array())) == bits(swarm.x[0])).all()
    if rule.receives_alike:
        assert all(len(set(plan.sources)) <= 1 for plan in swarm.plans)
        assert all(plan.receive != "newest" for plan in swarm.plans)


@relaxed
@given(any_rule, st.integers(2, 5).flatmap(sync_points), st.integers(0, 3))
def test_a_dead_particle_comes_back_finite(rule, sync_point, rounds_before):
    fitness, alive = sync_point
    swarm = Simulation(rule, torch.linspace(-1, 1, 7), len(alive))
    for _ in range(rounds_before):
        for i, x in enumerate(swarm.x):
            x += 0.1 * (i + 1)
        swarm.sync([float(i) for i in range(len(alive))])
    for x, state, living in zip(swarm.x, swarm.state, alive, strict=True):
        if not living:
            x.fill_(math.nan)
            # What is common to all particles, such as an anchor, training cannot touch.
            for name in {"velocity", "best_position"} & state.keys():
                state[name].fill_(math.nan)
    swarm.sync(fitness, alive)
    for x, state in zip(swarm.x, swarm.state, strict=True):
        assert all(tensor.isfinite().all() for tensor in (x, *state.values()))


@settings(relaxed, max_examples=200)
@given(any_rule, st.integers(2, 5).flatmap(sync_points), st.sampled_from([0.0, 0.5, 1e15, math.inf]), losses, seeds)
def test_what_the_dead_hold_and_report_reaches_nobody(rule, sync_point, held, reported, seed):
    """They may have died of their loss, with weights that look well."""
    fitness, alive = sync_point
    told = [loss if living else reported for loss, living in zip(fitness, alive, strict=True)]
    a, b = scattered(rule, sync_point, seed), scattered(rule, (told, alive), seed, dead=held)
    assert np.array_equal(a.array(), b.array())
    assert all(np.array_equal(a.states(name), b.states(name)) for name in a.state[0])
    assert (a.lr_factors, a.memory) == (b.lr_factors, b.memory)


@relaxed
@given(any_rule, st.integers(2, 5))
def test_particles_that_agree_stay_where_they_are(rule, num_particles):
    start = torch.linspace(-1, 1, 5)
    swarm = Simulation(rule, start, num_particles)
    for _ in range(3):
        swarm.sync([1.0] * num_particles)
    for x in swarm.x:
        torch.testing.assert_close(x, start)


@relaxed
@given(any_rule)
def test_a_lone_particle_keeps_a_shape_a_dtype_and_a_place_in_memory(rule):
    x = torch.ones(2, 3, 4)
    swarm = Simulation(rule, x, 1)
    (address,) = [x.data_ptr() for x in swarm.x]
    swarm.sync([1.0])
    assert swarm.x[0].data_ptr() == address
    assert {(t.shape, t.dtype) for t in swarm.state[0].values()} <= {(x.shape, x.dtype)}


@pytest.mark.parametrize("name", RULES)
def test_options_are_strict_and_have_defaults(name):
    config = RULES[name].Config
    config()
    with pytest.raises(ValidationError):
        config(no_such_option=1)
    for field in config.model_fields.values():
        assert field.description, "docs/configuration.md is made from it"
        assert not field.is_required()


@relaxed
@given(histories, any_rule)
def test_what_lives_on_is_state_and_memory(rounds, rule):
    """A rule object made anew between two sync points goes on as the old one would have."""
    swarms = [Simulation(rule, torch.ones(4), len(rounds[0][0])) for _ in range(2)]
    for fitness, alive in rounds:
        swarms[1].rule = type(rule)(rule.options, seed=rule.seed)
        for swarm in swarms:
            for i, x in enumerate(swarm.x):
                x += i
            swarm.sync(fitness, alive)
    assert np.array_equal(swarms[0].array(), swarms[1].array())
    assert swarms[0].lr_factors == swarms[1].lr_factors


@relaxed
@given(any_rule, st.integers(2, 5).flatmap(sync_points), seeds)
def test_rules_that_use_no_fitness_ignore_it(rule, sync_point, seed):
    if rule.uses_fitness:
        return
    fitness, alive = sync_point
    a, b = scattered(rule, sync_point, seed), scattered(rule, ([0.0] * len(fitness), alive), seed)
    assert np.array_equal(a.array(), b.array())


def test_make_rule_builds_what_the_registry_names():
    assert all(type(make_rule(name)) is rule for name, rule in RULES.items())
