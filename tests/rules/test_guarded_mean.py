"""The swarm rule against its equations in NumPy, stage by stage, and what its guard is there for."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .simulation import Simulation, histories, make_rule, relaxed, seeds, swarm_rules

NAN, INF = math.nan, math.inf
TARGET = 3.0


def distance(x):
    """Loss on the probe batch: how far the weights are from a target."""
    return float(np.square(x - TARGET).mean()) if np.isfinite(x).all() else NAN


class NumpySwarm:
    """Written from the section on ``swarm`` of docs/sync-modes.md."""

    def __init__(self, options, num_particles, numel, total, seed):
        self.o, self.total, self.seed, self.index = options, total, seed, 0
        self.anchor = self.step = np.zeros(numel)
        self.window, self.mu, self.lean, self.sigma, self.z = [], 0.0, 0.0, 0.0, None
        self.lr_factors = np.ones(num_particles)

    def softmax(self, losses):
        weights = np.exp(-(losses - losses.min()) / self.o.temperature)
        return weights / weights.sum()

    def unequal(self, losses):
        finite = losses[np.isfinite(losses)]
        if not len(finite):
            return False
        return 1 / (len(finite) * np.square(self.softmax(finite)).sum()) < 1 - self.o.unequal_above

    def sync(self, x, fitness, alive, steps):
        """x: shape (P, n); steps: since the last sync point. Returns what the guard did."""
        alive, o = np.array(alive), self.o
        losses = np.where(alive & ~np.isnan(fitness), fitness, INF)
        self.window += [losses] * steps
        compared = len(self.window) >= o.fitness_steps
        if compared:
            losses, self.window = np.mean(self.window, axis=0), []
        mean, guard, believed = x[alive].mean(axis=0), None, compared and self.unequal(losses)
        if compared and o.guard:
            losses = np.array([distance(row) if living else INF for row, living in zip(x, alive, strict=True)])
            believed = False
            if self.unequal(losses):
                weights = self.softmax(losses)
                weights[weights < 0.1 / len(weights)] = 0
                weighted = np.average(x[weights > 0], axis=0, weights=weights[weights > 0])
                believed = distance(weighted) < distance(mean)
                guard, mean = ("weighted", weighted) if believed else ("mean", mean)
        beta = 0 if self.total and (self.total <= 10 or self.index + 1 >= self.total) else o.inertia
        self.step = beta * self.step + self.anchor - mean
        self.anchor = self.anchor - self.step
        self.set_rates(losses if compared else None, believed, alive)
        self.index += 1
        return guard

    def set_rates(self, compared, believed, alive):
        if compared is not None and self.z is not None:
            ranks = np.array([(compared[alive] < v).sum() + (compared[alive] <= v).sum() for v in compared])
            utility = np.where(alive, ranks[alive].mean() - ranks, 0.0)  # those who tie share the rank between them
            utility /= np.abs(utility).sum() or 1.0
            s = utility @ self.z
            chance = np.sqrt(np.square(utility).sum() * np.square(self.z).sum() / max(1, len(alive) - 1))
            self.lean = 0.7 * self.lean + (s / chance if chance > 0 else 0)
            if believed or (s > 0 and self.lean > 2.5):
                self.mu = np.clip(self.mu + self.o.lr_step * self.sigma * s, -np.log(1000), np.log(1000))
        shrink = min(1, 2 * (1 - (self.index + 1) / self.total)) if self.total else 1
        self.sigma = np.log(self.o.lr_spread) * max(0, shrink)
        if self.z is None or compared is not None:
            even = np.linspace(-1, 1, len(alive)) if len(alive) > 1 else np.zeros(1)
            self.z = np.random.default_rng([self.seed, self.index]).permutation(even)
        self.lr_factors = np.exp(self.mu + self.sigma * self.z)


@settings(relaxed, max_examples=300)
@given(
    swarm_rules,
    histories,
    st.sampled_from([None, 4, 12]),
    st.integers(1, 5),
    st.floats(0.1, 3),
    st.lists(st.integers(1, 3), min_size=6, max_size=6),
    seeds,
)
def test_follows_the_equations(rule, rounds, total, numel, scale, steps, seed):
    rng, num_particles = np.random.default_rng(seed), len(rounds[0][0])
    oracle = NumpySwarm(rule.options, num_particles, numel, total, rule.seed)
    start = torch.zeros(numel, dtype=torch.float64)
    swarm = Simulation(rule, start, num_particles, score=distance, total=total)
    for (fitness, alive), n in zip(rounds, steps, strict=False):
        for x, living in zip(swarm.x, alive, strict=True):
            x += torch.from_numpy(scale * rng.normal(size=numel)) if living else NAN
        before = swarm.array()
        plan = swarm.sync(fitness, alive, steps=[n] * num_particles)
        assert plan.note.get("guard") == oracle.sync(before, np.array(fitness), alive, n)
        np.testing.assert_allclose(swarm.array(), np.tile(oracle.anchor, (num_particles, 1)), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(swarm.lr_factors, oracle.lr_factors, rtol=1e-9)
        if "momentum" in swarm.state[0]:
            np.testing.assert_allclose(swarm.states("momentum")[-1], oracle.step, rtol=1e-9, atol=1e-9)
        assert all(np.isfinite(swarm.states(name)).all() for name in swarm.state[0])


def plain(**options):
    """No guard and no learning rates of one's own."""
    return make_rule("swarm", guard=False, lr_spread=1.0, **options)


def test_without_fitness_it_is_the_heavy_ball_of_torch():
    """SGD with momentum on the pseudo-gradient a - m; velocities of torch begin at the first gradient."""
    rng = np.random.default_rng(0)
    swarm = Simulation(plain(inertia=0.6), torch.zeros(6, dtype=torch.float64), 3)
    outer = torch.zeros(6, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.SGD([outer], lr=1.0, momentum=0.6)
    for _ in range(20):
        for x in swarm.x:
            x += torch.from_numpy(rng.normal(size=6))
        outer.grad = outer.detach() - sum(swarm.x) / 3
        optimizer.step()
        swarm.sync([1.0] * 3)
        torch.testing.assert_close(swarm.x[0], outer.detach(), rtol=1e-12, atol=1e-12)


def test_without_inertia_and_guard_it_is_local_sgd_bit_for_bit():
    rng = np.random.default_rng(1)
    swarms = [Simulation(rule, torch.zeros(50), 3) for rule in (plain(inertia=0.0), make_rule("local_sgd"))]
    for _ in range(10):
        moves = torch.from_numpy(rng.normal(size=(3, 50)).astype(np.float32))
        for swarm in swarms:
            for x, move in zip(swarm.x, moves, strict=True):
                x += move
            swarm.sync([1.0] * 3)
        assert np.array_equal(swarms[0].array(), swarms[1].array())


def test_the_last_sync_point_gives_the_mean_bit_for_bit():
    """Also when inertia has built up."""
    rng = np.random.default_rng(2)
    swarm = Simulation(plain(inertia=0.5), torch.zeros(50), 3, total=12)
    for _ in range(12):
        for x in swarm.x:
            x += torch.from_numpy(rng.normal(size=50).astype(np.float32))
        mean = sum(x * (1 / 3) for x in swarm.x)
        swarm.sync([1.0] * 3)
    assert torch.equal(swarm.x[0], mean)


@pytest.mark.parametrize(
    ("total", "index", "coasts"),
    [(None, 5, True), (12, 5, True), (12, 11, False), (12, 14, False), (11, 5, True), (10, 5, False)],
)
def test_inertia_ends_with_training_and_is_not_for_short_ones(total, index, coasts):
    swarm = Simulation(plain(inertia=0.5), torch.zeros(1), 2, total=total)
    for _ in range(index):
        for x in swarm.x:
            x += 1.0
        swarm.sync([1.0, 1.0])
    before = swarm.x[0].item()
    swarm.sync([1.0, 1.0])  # nobody has moved
    assert (swarm.x[0].item() > before) == coasts


# -- the guard --------------------------------------------------------------------------------


def sync_point(places, fitness, alive=None, **options):
    """One sync point of particles at these distances from the target; returns the swarm and the last plan."""
    rule = make_rule("swarm", inertia=0.0, fitness_steps=1, **options)
    swarm = Simulation(rule, torch.zeros(1, dtype=torch.float64), len(places), score=distance)
    swarm.sync([1.0] * len(places))  # nothing to see: all at the start, and of one opinion
    for x, place in zip(swarm.x, places, strict=True):
        x.fill_(TARGET + place)
    return swarm, swarm.sync(fitness, alive)


def test_equal_particles_cost_one_score():
    """Whatever their training losses are: those with other data have others."""
    swarm, plan = sync_point([1.0, -1.0, 1.0, -1.0], [0.1, 2.0, 4.0, 6.0])
    assert len(swarm.plans) == 2
    assert [p.score for p in swarm.plans] == [True, False]
    assert "guard" not in plan.note
    np.testing.assert_allclose(swarm.array(), TARGET)


def test_a_spoilt_particle_is_noticed_and_left_out():
    """Its own training loss may say nothing, as when its labels are wrong and it has learned them."""
    swarm, plan = sync_point([0.1, -0.1, 0.1, 8.0], [0.1, 0.1, 0.1, 0.1])
    assert plan.note["guard"] == "weighted"
    assert np.abs(swarm.array() - TARGET).max() < 0.11
    assert plan.note["weights"][3] == 0.0
    assert plan.note["guard_scores"]["weighted"] < plan.note["guard_scores"]["mean"]


def test_the_weighted_mean_must_be_better():
    """The worst particle may be what balances the others."""
    swarm, plan = sync_point([1.0, 1.0, -2.0], [0.1, 0.1, 4.0])
    assert plan.note["guard"] == "mean"
    np.testing.assert_allclose(swarm.array(), TARGET)
    assert plan.note["weights"] == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize(("weighted", "winner"), [(0.999, "weighted"), (1.0, "mean"), (INF, "mean")])
def test_a_tie_goes_to_the_mean(weighted, winner):
    scores = iter([0.5, 0.5, 0.5, 9.0] + [1.0] * 4 + [weighted] * 4)  # of each, of the mean, of the weighted mean
    rule = make_rule("swarm", fitness_steps=1)
    swarm = Simulation(rule, torch.zeros(2), 4, score=lambda x: next(scores))
    assert swarm.sync([0.1, 0.1, 0.1, 5.0]).note["guard"] == winner


@pytest.mark.parametrize("place", [1e3, 1e30, NAN])
def test_exploded_weights_are_never_mixed_in(place):
    """Also with a temperature at which softmax alone would leave them a small weight."""
    swarm, plan = sync_point([0.1, -0.1, 0.1, place], [0.1, 0.1, 0.1, 0.1], temperature=1e5)
    assert np.abs(swarm.array() - TARGET).max() < 0.11, plan


def test_the_dead_are_not_heard_even_with_good_weights():
    """A loss that is not finite is enough to be dead; the weights may still be the best of all."""
    swarm, plan = sync_point([1.0, 1.2, 8.0, 0.0], [0.1, 0.1, 0.1, NAN], [True, True, True, False], temperature=0.3)
    assert plan.note["guard"] == "weighted"
    assert plan.note["weights"][2:] == (0.0, 0.0)
    assert (swarm.array() > TARGET + 1.0).all()


def test_a_probe_that_gives_no_number_leaves_the_mean():
    swarm = Simulation(make_rule("swarm", inertia=0.0, fitness_steps=1), torch.zeros(2), 2, score=lambda x: NAN)
    for x in swarm.x:
        x += 1.0
    assert "guard" not in swarm.sync([0.1, 0.2]).note
    np.testing.assert_array_equal(swarm.array(), 1.0)


@relaxed
@given(st.integers(3, 8), st.floats(10, 1e30), st.floats(0.01, 1e3), seeds)
def test_an_exploded_particle_is_left_out_whatever_the_temperature(num_particles, place, temperature, seed):
    """Exploded means a loss far above the temperature, of weights that are still finite."""
    places = np.random.default_rng(seed).uniform(-0.1, 0.1, num_particles)
    places[seed % num_particles] = place * math.sqrt(1 + 10 * temperature)
    swarm, plan = sync_point(places.tolist(), [0.1] * num_particles, temperature=temperature)
    assert plan.note["weights"][seed % num_particles] == 0.0
    assert np.abs(swarm.array() - TARGET).max() <= 0.1 + 1e-9


def test_a_share_below_a_tenth_of_the_equal_one_becomes_nothing():
    rule = make_rule("swarm", temperature=1.0)
    for p in (2, 4, 8):
        edge = -math.log(0.1 / p)  # with softmax weights (1 - 0.1 / P, ..., 0.1 / P) or nearly so
        assert rule._weigh([0.0] + [INF] * (p - 2) + [edge + 0.5])[-1] == 0.0
        assert rule._weigh([0.0] + [INF] * (p - 2) + [edge - 0.5])[-1] > 0.0


# -- losses over several sync points -----------------------------------------------------------


def test_losses_are_compared_over_enough_steps():
    """8 steps a sync point and 32 to compare: the fourth, and again the eighth."""
    rule = make_rule("swarm", fitness_steps=32)
    swarm = Simulation(rule, torch.zeros(2), 4, score=distance)
    scored = []
    for _ in range(8):
        swarm.sync([1.0, 2.0, 3.0, 4.0], steps=[8, 8, 8, 8])
        scored.append(swarm.plans[0].score)
    assert scored == [False, False, False, True] * 2


def test_a_particle_that_skips_its_steps_holds_up_nobody():
    swarm = Simulation(make_rule("swarm", fitness_steps=16), torch.zeros(2), 2, score=distance)
    scored = []
    for _ in range(4):
        swarm.sync([1.0, 1.0], steps=[8, 0])
        scored.append(swarm.plans[0].score)
    assert scored == [False, True] * 2


def test_a_sync_point_right_after_another_counts_as_one_step():
    """It has no steps of its own, and the losses of the one before."""
    swarm = Simulation(make_rule("swarm", fitness_steps=8, guard=False), torch.zeros(2), 2)
    swarm.sync([1.0, 2.0], steps=[0, 0])
    assert swarm.memory["loss_sums"] == [1.0, 2.0]
    assert swarm.memory["steps"] == 1


def test_the_noise_of_short_windows_cancels():
    """Losses that differ at each sync point, in turns, and not over two of them."""
    noted = []
    for steps in (1, 2):
        swarm = Simulation(make_rule("swarm", fitness_steps=steps, guard=False, lr_step=1.0), torch.zeros(1), 2)
        for i in range(6):
            swarm.sync([1.0, 3.0] if i % 2 else [3.0, 1.0], steps=[1, 1])
        noted.append(swarm.memory["mu"])
    assert noted[0] != 0.0
    assert noted[1] == 0.0


# -- learning rates ------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(0, 2**70))
@relaxed
def test_rates_are_spread_evenly_and_dealt_by_chance(num_particles, seed):
    swarm = Simulation(
        make_rule("swarm", seed, lr_spread=2.0, guard=False, fitness_steps=1), torch.zeros(1), num_particles
    )
    orders = set()
    for _ in range(40):  # two particles are dealt the same way each time once in 2^39
        swarm.sync([1.0] * num_particles)
        logs = np.log2(swarm.lr_factors)
        np.testing.assert_allclose(np.sort(logs), np.linspace(-1, 1, num_particles), atol=1e-12)
        orders.add(swarm.lr_factors)
    assert len(orders) > 1


def test_the_spread_shrinks_in_the_second_half_and_ends_at_zero():
    swarm = Simulation(make_rule("swarm", lr_spread=2.0, guard=False), torch.zeros(1), 4, total=20)
    widths = []
    for _ in range(20):
        swarm.sync([1.0] * 4)
        widths.append(math.log2(max(swarm.lr_factors)))
    np.testing.assert_allclose(widths[:10], 1.0)
    np.testing.assert_allclose(np.diff(widths[9:]), -0.1)
    assert widths[-1] == pytest.approx(0.0)


@relaxed
@given(swarm_rules, histories, seeds)
def test_rates_and_their_changes_are_bounded(rule, rounds, seed):
    """Between 1 / lr_spread and lr_spread times a common rate, whose log moves by lr_step times that of lr_spread."""
    rng, spread = np.random.default_rng(seed), math.log(rule.options.lr_spread) + 1e-9
    num_particles, common = len(rounds[0][0]), 0.0
    swarm = Simulation(rule, torch.zeros(2, dtype=torch.float64), num_particles, score=distance)
    for fitness, alive in rounds:
        for x in swarm.x:
            x += torch.from_numpy(rng.normal(size=2))
        swarm.sync(fitness, alive)
        logs = np.log(swarm.lr_factors)
        assert np.abs(logs - logs.mean()).max() <= spread
        assert abs(logs.mean() - common) <= rule.options.lr_step * spread + 1e-9
        common = logs.mean()


def test_rates_are_those_of_the_seed():
    def rates(seed):
        swarm = Simulation(make_rule("swarm", seed, guard=False, fitness_steps=1), torch.zeros(1), 8)
        return [(swarm.sync([float(i) for i in range(8)]), swarm.lr_factors)[1] for _ in range(5)]

    assert rates(7) == rates(7)
    assert all(a != b for a, b in zip(rates(7), rates(8), strict=True))


def compare(better: str, rounds: int, *, num_particles: int = 4, unequal: bool, weighted: float = 1.0) -> list[float]:
    """The common rate after each of some sync points at which those with the higher or the lower rate were better.

    Args:
        unequal: whether the scores of the particles are clearly so.
        weighted: score of the weighted mean; that of the mean is 2.
    """
    scores = iter(())
    swarm = Simulation(make_rule("swarm", fitness_steps=1), torch.zeros(2), num_particles, score=lambda x: next(scores))
    rates = []
    for _ in range(rounds + 1):
        order = np.argsort(np.argsort(swarm.lr_factors)) / num_particles
        own = 1 + (10.0 if unequal else 0.001) * (order if better == "lower" else -order + 1)
        scores = iter([*own.tolist(), *[2.0] * num_particles, *[weighted] * num_particles])
        swarm.sync([1.0] * num_particles)
        rates.append(float(np.exp(np.log(swarm.lr_factors).mean())))
    return rates[1:]  # at the first there were no rates to compare


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_where_the_weighted_mean_wins_the_common_rate_follows_at_once(better):
    (rate,) = compare(better, 1, unequal=True)
    assert rate > 1.3 if better == "higher" else rate < 1 / 1.3


def test_where_the_weighted_mean_loses_a_lower_rate_is_not_believed():
    assert compare("lower", 20, unequal=True, weighted=3.0) == pytest.approx([1.0] * 20)


def test_a_lower_rate_nearly_always_looks_better_for_a_while_and_is_not_believed():
    assert compare("lower", 20, unequal=False) == pytest.approx([1.0] * 20)


@pytest.mark.parametrize(("num_particles", "patience"), [(2, 4), (4, 2), (8, 1)])
def test_a_higher_rate_is_believed_when_it_is_better_again_and_again(num_particles, patience):
    """The fewer the particles, the more often they stand in this order by chance."""
    rates = compare("higher", 6, num_particles=num_particles, unequal=False)
    assert rates[: patience - 1] == pytest.approx([1.0] * (patience - 1))
    assert all(b > 1.2 * a for a, b in itertools.pairwise([1.0, *rates[patience - 1 :]]))


def test_without_differences_the_common_rate_stays():
    for guard in (True, False):
        swarm = Simulation(make_rule("swarm", fitness_steps=1, guard=guard), torch.zeros(2), 5)
        for _ in range(20):
            swarm.sync([1.0] * 5)
        assert swarm.memory["mu"] == 0.0


def test_chance_seldom_moves_the_common_rate():
    """Scores in random order, 8 particles: less often than once in 20 comparisons."""
    rng = np.random.default_rng(0)
    swarm = Simulation(
        make_rule("swarm", fitness_steps=1), torch.zeros(2), 8, score=lambda x: 1 + 1e-3 * float(rng.random())
    )
    rates = []
    for _ in range(400):
        swarm.sync([1.0] * 8)
        rates.append(swarm.memory["mu"])
    assert np.count_nonzero(np.diff(rates)) < 20


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_common_rate_moves_to_that_of_the_better_particles(guard, better):
    """Those with the better rates are closer to the target, and have lower losses."""
    sign = 1 if better == "higher" else -1
    rule = make_rule("swarm", inertia=0.0, guard=guard, fitness_steps=1)
    swarm = Simulation(rule, torch.zeros(1, dtype=torch.float64), 4, score=distance)
    swarm.sync([1.0] * 4)
    for _ in range(10):
        for x, factor in zip(swarm.x, swarm.lr_factors, strict=True):
            x.fill_(TARGET + 2.0 - sign * 2 * math.log(factor / math.exp(swarm.memory["mu"])))
        swarm.sync([distance(x.numpy()) for x in swarm.x])
    assert sign * swarm.memory["mu"] > 1.0
    assert np.mean(np.log(swarm.lr_factors)) == pytest.approx(swarm.memory["mu"])


def test_the_common_rate_has_bounds():
    """The highest rate wins every time, as it does where losses are compared after too few steps."""
    rule = make_rule("swarm", guard=False, fitness_steps=1, lr_spread=10.0, lr_step=100.0)
    swarm = Simulation(rule, torch.zeros(1), 2)
    swarm.sync([1.0, 1.0])
    for _ in range(50):
        swarm.sync([1.0 if factor == max(swarm.lr_factors) else 5.0 for factor in swarm.lr_factors])
    assert swarm.memory["mu"] == pytest.approx(math.log(1000))
    assert max(swarm.lr_factors) == pytest.approx(10_000)
