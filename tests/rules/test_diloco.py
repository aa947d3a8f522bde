"""DiLoCo against its equations in NumPy, and against torch's SGD as the outer optimizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_pso.rules import SyncPoint

from .simulation import Simulation, diloco_rules, make_rule, relaxed, sync_points


class NumpyDiLoCo:
    """Algorithm 1 of arXiv 2311.08105, with OuterOpt = SGD with Nesterov momentum."""

    def __init__(self, start: np.ndarray, eta: float, mu: float) -> None:
        self.theta, self.buffer, self.eta, self.mu = start.copy(), np.zeros_like(start), eta, mu

    def sync(self, particles: np.ndarray) -> np.ndarray:
        gradient = np.mean([self.theta - x for x in particles], axis=0)
        self.buffer = self.mu * self.buffer + gradient
        self.theta = self.theta - self.eta * (gradient + self.mu * self.buffer)
        return self.theta


@relaxed
@given(
    diloco_rules,
    st.integers(1, 5).flatmap(lambda p: st.lists(sync_points(p), min_size=1, max_size=6)),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_follows_the_paper(rule, rounds, numel, seed):
    rng = np.random.default_rng(seed)
    start, num_particles = rng.normal(size=numel), len(rounds[0][0])
    oracle = NumpyDiLoCo(start, rule.options.outer_lr, rule.options.outer_momentum)
    swarm = Simulation(rule, torch.from_numpy(start.copy()), num_particles)
    for fitness, alive in rounds:
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(rng.normal(size=numel)) if living else float("nan")
        expected = oracle.sync(swarm.array()[np.array(alive)])
        swarm.sync(fitness, alive)
        np.testing.assert_allclose(swarm.array(), np.tile(expected, (num_particles, 1)), rtol=1e-9, atol=1e-9)
        for state in swarm.state:
            np.testing.assert_allclose(state["anchor"].numpy(), expected, rtol=1e-9, atol=1e-9)
            if rule.options.outer_momentum > 0:
                np.testing.assert_allclose(state["momentum"].numpy(), oracle.buffer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.9])
def test_equals_torch_sgd_on_the_pseudo_gradient(momentum):
    rng = np.random.default_rng(1)
    target = torch.from_numpy(rng.normal(size=8))
    swarm = Simulation(make_rule("diloco", outer_lr=0.7, outer_momentum=momentum), torch.zeros_like(target), 3)
    outer = torch.zeros_like(target).requires_grad_()
    optimizer = torch.optim.SGD([outer], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for _ in range(60):
        for x in swarm.x:
            for _ in range(4):  # f(x) = ||x - x*||^2, with noise
                x -= 0.05 * (2 * (x - target) + 0.01 * torch.from_numpy(rng.normal(size=8)))
        outer.grad = outer.detach() - sum(swarm.x) / 3
        optimizer.step()
        swarm.sync([0.0] * 3)
        torch.testing.assert_close(swarm.x[1], outer.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(swarm.x[0], target, rtol=0, atol=0.01)


def test_rate_one_and_no_momentum_is_local_sgd():
    rng = np.random.default_rng(2)
    start = torch.from_numpy(rng.normal(size=50).astype(np.float32))
    swarms = [
        Simulation(make_rule("diloco", outer_lr=1.0, outer_momentum=0.0), start, 3),
        Simulation(make_rule("local_sgd"), start, 3),
    ]
    for _ in range(10):
        moves = torch.from_numpy(rng.normal(size=(3, 50)).astype(np.float32))
        for swarm in swarms:
            for x, move in zip(swarm.x, moves, strict=True):
                x += move
            swarm.sync([0.0] * 3)
        torch.testing.assert_close(swarms[0].x, swarms[1].x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("momentum", "names"), [(0.0, {"anchor"}), (0.9, {"anchor", "momentum"})])
def test_keeps_momentum_only_when_there_is_any(momentum, names):
    x = torch.ones(3)
    state = make_rule("diloco", outer_momentum=momentum).init_state(x)
    assert state.keys() == names
    x += 1
    assert state["anchor"].tolist() == [1.0] * 3, "the anchor must not move with the weights"


@pytest.mark.parametrize(
    ("optimizer", "particles", "total", "expected"),
    [
        ("AdamW", 1, 1000, (0.4, 0.9)),
        ("AdamW", 2, None, (0.6, 0.9)),
        ("DeepSpeedCPUAdam", 4, 65, (0.6, 0.9)),
        ("AdamW", 4, 64, (0.7, 0.6)),
        ("AdamW", 6, 1000, (0.717, 0.9)),  # 0.6 + 0.2 log(6 / 4) / log(8 / 4)
        ("AdamW", 100, 1000, (0.8, 0.9)),
        ("MuonWithAuxAdam", 1, 1000, (0.7, 0.6)),
        ("MuonWithAuxAdam", 4, 1000, (0.933, 0.833)),  # a third of the way from 2 to 16
        ("MuonWithAuxAdam", 16, 1000, (1.0, 0.9)),
        ("MuonWithAuxAdam", 2, 10, (0.7, 0.6)),
    ],
)
def test_auto_is_what_was_published(optimizer, particles, total, expected):
    rule = make_rule("diloco").inside(optimizer)
    plan = rule.plan(SyncPoint(0, (0.0,) * particles, (True,) * particles, total), {})
    assert plan.factors == (expected,) * particles
    assert plan.note == {"outer_lr": expected[0], "outer_momentum": expected[1]}


def test_one_of_the_two_may_be_given():
    point = SyncPoint(0, (0.0,) * 4, (True,) * 4, 1000)
    assert make_rule("diloco", outer_lr=0.3).plan(point, {}).factors[0] == (0.3, 0.9)
    assert make_rule("diloco", outer_momentum=0.2).plan(point, {}).factors[0] == (0.6, 0.2)
    assert make_rule("diloco", outer_momentum=0.0).initial_state.keys() == {"anchor"}
    assert make_rule("diloco").initial_state.keys() == {"anchor", "momentum"}


def test_a_rule_is_made_for_an_optimizer_without_changing_the_first():
    first = make_rule("diloco")
    point = SyncPoint(0, (0.0,) * 2, (True,) * 2)
    assert first.inside("MuonWithAuxAdam").plan(point, {}).factors[0] == (0.9, 0.8)
    assert first.plan(point, {}).factors[0] == (0.6, 0.9)


@relaxed
@given(
    st.floats(0.1, 2),
    st.floats(0, 0.99),
    st.sampled_from([False, True]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_it_acts_alone_unless_the_outer_step_goes_where_the_particle_is(eta, mu, plain, rounds, seed):
    rule = make_rule("diloco", outer_lr=1.0 if plain else eta, outer_momentum=0.0 if plain else mu)
    rng = np.random.default_rng(seed)
    swarm = Simulation(rule, torch.from_numpy(rng.normal(size=7)), 1)
    moved = False
    for _ in range(rounds):
        swarm.x[0] += torch.from_numpy(rng.normal(size=7))
        before = swarm.array()
        swarm.sync([1.0])
        moved |= not np.allclose(swarm.array(), before, rtol=1e-12, atol=1e-12)
    assert moved == rule.acts_alone


def test_auto_acts_alone():
    assert make_rule("diloco").acts_alone
    assert make_rule("diloco", outer_lr=1).acts_alone, "with the momentum that was published"
    assert make_rule("diloco", outer_momentum=0).acts_alone
    assert not any(make_rule(name).acts_alone for name in ("local_sgd", "easgd", "nosync", "pso"))
