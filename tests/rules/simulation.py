"""P particles in one process: the steps of a sync point, with lists in place of peers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_pso.rules import RULES, Place, Plan, Rule, SyncPoint


class Simulation:
    """Holds every particle's weights and state, and lets them meet."""

    def __init__(self, rule: Rule, start: Tensor, num_particles: int) -> None:
        self.rule = rule
        self.x = [start.clone() for _ in range(num_particles)]
        self.state = [rule.init_state(x) for x in self.x]
        self.memory: dict = {}
        self.index = 0

    def sync(self, fitness: Sequence[float], alive: Sequence[bool] | None = None) -> Plan:
        point = SyncPoint(self.index, tuple(fitness), tuple(alive or [True] * len(self.x)))
        plan, *others = [self.rule.plan(point, self.memory) for _ in self.x]
        assert all(other == plan for other in others), "ranks disagree"
        particles = list(enumerate(zip(self.x, self.state, strict=True)))
        for i, (x, state) in particles:
            self.rule.before_exchange(x, state, plan, Place(i))
        outgoing = self.x if plan.send == "x" else [state[plan.send] for state in self.state]
        if plan.receive == "mean":
            received = sum(w * x for w, x in zip(plan.weights, outgoing, strict=True) if w != 0)
        else:
            received = outgoing[plan.source].clone()
        for i, (x, state) in particles:
            self.rule.update(x, received.clone(), state, plan, Place(i))
        # Memory goes through a checkpoint after every sync.
        self.memory = json.loads(json.dumps(plan.memory))
        assert self.memory == plan.memory
        self.index += 1
        return plan

    def array(self) -> np.ndarray:
        """All weights, shape (P, n)."""
        return np.stack([x.numpy() for x in self.x])


def make_rule(name: str, seed: int = 0, **options: object) -> Rule:
    return RULES[name](RULES[name].Config(**options), seed=seed)


# How thoroughly to look, on machines that may be slow and busy.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


# -- strategies -----------------------------------------------------------------------------

losses = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, math.nan, math.inf]))


@st.composite
def meetings(draw: st.DrawFn, num_particles: int) -> tuple[list[float], list[bool]]:
    """(fitness, alive) of a sync point; at least one particle lives."""
    fitness = draw(st.lists(losses, min_size=num_particles, max_size=num_particles))
    alive = draw(st.lists(st.booleans(), min_size=num_particles, max_size=num_particles))
    alive[draw(st.integers(0, num_particles - 1))] = True
    return fitness, alive


diloco_rules = st.builds(
    make_rule,
    st.just("diloco"),
    outer_lr=st.floats(0.01, 2),
    outer_momentum=st.one_of(st.just(0.0), st.floats(0, 0.95)),
)
pso_rules = st.builds(
    make_rule,
    st.just("pso"),
    seed=st.integers(0, 2**70),
    inertia=st.sampled_from([0.0, 0.3, 0.9]),
    cognitive=st.sampled_from([0.0, 0.5, 1.5]),
    social=st.sampled_from([0.0, 1.0, 1.5]),
    best=st.sampled_from(["window", "all_time"]),
    randomness=st.sampled_from(["none", "per_sync"]),
)
any_rule = st.one_of(st.builds(make_rule, st.just("local_sgd")), diloco_rules, pso_rules)
