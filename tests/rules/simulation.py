"""P particles in one process: the steps of a sync point, with lists in place of peers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_pso.rules import RULES, Place, Plan, Rule, SyncPoint


class Simulation:
    """Holds every particle's weights and state, and lets them sync.

    Args:
        start: weights of all particles, shape (n,).
        score: loss of weights (n,) on the probe batch.
        total: sync points of the whole training; 20 for rules that must know it.
        parameters: names and sizes of the parameters of which ``start`` consists.
    """

    def __init__(
        self,
        rule: Rule,
        start: Tensor,
        num_particles: int,
        *,
        score: Callable[[np.ndarray], float] = lambda x: float(np.square(x).sum()),
        total: int | None = None,
        parameters: Mapping[str, int] | None = None,
    ) -> None:
        self.rule = rule
        self.score = score
        self.total = 20 if total is None and rule.uses_progress else total
        self.parameters = dict(parameters or {"all": start.numel()})
        self.x = [start.clone() for _ in range(num_particles)]
        self.state = [rule.init_state(x) for x in self.x]
        self.lr_factors: tuple[float, ...] = (1.0,) * num_particles
        self.memory: dict = {}
        self.index = 0
        self.plans: list[Plan] = []  # of the last sync point

    def sync(self, fitness: Sequence[float], alive: Sequence[bool] | None = None, steps: Sequence[int] = ()) -> Plan:
        """Sync; returns the last plan."""
        point = SyncPoint(self.index, tuple(fitness), tuple(alive or [True] * len(self.x)), self.total, tuple(steps))
        plan = self._agreed(lambda: self.rule.plan(point, self.memory))
        self.plans = [plan]
        self._carry_out(plan)
        while plan.score:
            scores = tuple(self._score(x) for x in self.x)
            plan = self._agreed(lambda plan=plan, scores=scores: self.rule.proceed(plan, scores))
            self.plans.append(plan)
            self._carry_out(plan)
        # Memory goes through a checkpoint after every sync.
        self.memory = json.loads(json.dumps(plan.memory))
        assert self.memory == plan.memory
        self.lr_factors = plan.lr_factors or self.lr_factors
        self.index += 1
        return plan

    def _agreed(self, make: Callable[[], Plan]) -> Plan:
        plan, *others = [make() for _ in self.x]
        assert all(other == plan for other in others), "ranks disagree"
        return plan

    def _score(self, x: Tensor) -> float:
        loss = self.score(x.numpy())
        return loss if math.isfinite(loss) else math.inf

    def _carry_out(self, plan: Plan) -> None:
        particles = list(enumerate(zip(self.x, self.state, strict=True)))
        for i, (x, state) in particles:
            self.rule.before_exchange(x, state, plan, Place(i))
        outgoing = self.x if plan.send == "x" else [state[plan.send] for state in self.state]
        if plan.receive == "mean":
            mean = sum(w * x for w, x in zip(plan.weights, outgoing, strict=True) if w != 0)
            received = [mean.clone() for _ in self.x]
        elif plan.receive == "one":
            received = [outgoing[source].clone() for source in plan.sources]
        elif plan.receive == "newest":  # in place of messages: what the next living particle has sent just now
            received = [outgoing[self._next_living(i, plan.alive)].clone() for i in range(len(self.x))]
        else:
            assert plan.receive == "nothing"
            received = self.x
        for i, (x, state) in particles:
            for name, cut in self._cuts().items():
                piece = {key: value.view(-1)[cut] for key, value in state.items()}
                self.rule.update(x.view(-1)[cut], received[i].view(-1)[cut], piece, plan, Place(i, name))

    @staticmethod
    def _next_living(particle: int, alive: Sequence[bool]) -> int:
        """A lone one gets its own message."""
        others = [(particle + step) % len(alive) for step in range(1, len(alive) + 1)]
        return next(other for other in others if alive[other])

    def _cuts(self) -> dict[str, slice]:
        if not self.rule.per_parameter:
            return {"": slice(None)}  # nobody tells such a rule what parameter it updates
        stops = np.cumsum(list(self.parameters.values())).tolist()
        return {name: slice(stop - n, stop) for (name, n), stop in zip(self.parameters.items(), stops, strict=True)}

    def array(self) -> np.ndarray:
        """All weights, shape (P, n)."""
        return np.stack([x.numpy() for x in self.x])

    def states(self, name: str) -> np.ndarray:
        """A state tensor of all particles, shape (P, n)."""
        return np.stack([state[name].numpy() for state in self.state])


def make_rule(name: str, seed: int = 0, **options: object) -> Rule:
    return RULES[name](RULES[name].Config(**options), seed=seed)


# How thoroughly to look, on machines that may be slow and busy.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


# -- strategies -----------------------------------------------------------------------------

losses = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, math.nan, math.inf]))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def sync_points(draw: st.DrawFn, num_particles: int) -> tuple[list[float], list[bool]]:
    """(fitness, alive) of a sync point; at least one particle lives."""
    fitness = draw(st.lists(losses, min_size=num_particles, max_size=num_particles))
    alive = draw(st.lists(st.booleans(), min_size=num_particles, max_size=num_particles))
    alive[draw(st.integers(0, num_particles - 1))] = True
    return fitness, alive


# Several sync points of the same 1 to 5 particles.
histories = st.integers(1, 5).flatmap(lambda p: st.lists(sync_points(p), min_size=1, max_size=6))


@st.composite
def _pso_options(draw: st.DrawFn) -> dict[str, Any]:
    options: dict[str, Any] = {
        "best": draw(st.sampled_from(["window", "all_time"])),
        "randomness": draw(st.sampled_from(["none", "per_sync", "per_tensor"])),
        "topology": draw(st.sampled_from(["global", "ring"])),
        "velocity_clamp": draw(st.sampled_from([None, 0.1, 100.0])),
        "constriction": draw(st.booleans()),
    }
    if options["constriction"]:
        return options | {"cognitive": draw(st.sampled_from([2.05, 3.0])), "social": 2.05, "final_social": 2.5}
    return options | {
        "inertia": draw(st.sampled_from([0.0, 0.3, 0.9])),
        "cognitive": draw(st.sampled_from([0.0, 0.5, 1.5])),
        "social": draw(st.sampled_from([0.0, 1.0, 1.5])),
        "final_inertia": draw(st.sampled_from([None, 0.0, 0.5])),
        "final_cognitive": draw(st.sampled_from([None, 0.0, 1.0])),
        "final_social": draw(st.sampled_from([None, 0.5])),
    }


diloco_rules = st.builds(
    make_rule,
    st.just("diloco"),
    outer_lr=st.floats(0.01, 2),
    outer_momentum=st.one_of(st.just(0.0), st.floats(0, 0.95)),
)
pso_rules = st.builds(lambda seed, options: make_rule("pso", seed, **options), st.integers(0, 2**70), _pso_options())
easgd_rules = st.builds(make_rule, st.just("easgd"), beta=st.floats(0.01, 1))
nosync_rules = st.builds(
    make_rule,
    st.just("nosync"),
    pressure=st.floats(0.01, 1),
    final_pressure=st.floats(0.01, 1),
    growth=st.sampled_from(["linear", "exponential", "constant"]),
)
noloco_rules = st.builds(
    make_rule,
    st.just("noloco"),
    seed=st.integers(0, 2**70),
    outer_lr=st.floats(0.1, 1.2),
    outer_momentum=st.one_of(st.just(0.0), st.floats(0, 0.9)),
)
asynchronous_rules = st.builds(make_rule, st.just("nosync"), asynchronous=st.just(True), pressure=st.floats(0, 1))
swarm_rules = st.builds(
    make_rule,
    st.just("swarm"),
    seed=st.integers(0, 2**70),
    inertia=st.sampled_from([0.0, 0.3, 0.9]),
    guard=st.booleans(),
    fitness_steps=st.integers(1, 3),
    temperature=st.sampled_from([0.05, 0.3, 5.0]),
    unequal_above=st.sampled_from([0.01, 0.1, 0.6]),
    lr_spread=st.sampled_from([1.0, 1.5, 3.0]),
    lr_step=st.sampled_from([0.0, 0.5, 2.0]),
)
line_search_rules = st.builds(
    make_rule, st.just("line_search"), inertia=st.floats(0.1, 1), longest=st.floats(0.5, 2), margin=st.floats(0, 0.5)
)
any_rule = st.one_of(
    st.builds(make_rule, st.just("local_sgd")),
    diloco_rules,
    pso_rules,
    easgd_rules,
    noloco_rules,
    nosync_rules,
    asynchronous_rules,
    swarm_rules,
    line_search_rules,
)
