"""A rule of your own, gossip: at a sync point every particle moves part of the way to one other, drawn at random.

PYTHONPATH=recipes ds-pso simulate recipes/own_script.py --deepspeed_config own.json

with "swarm": {"particles": 4, "sync_mode": "own_rule:OwnRule", "own_rule:OwnRule": {"part": 0.5}} in own.json; under
a launcher it is found in the same way.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from ds_pso.rules import Place, Plan, Rule, RuleConfig, SyncPoint
from ds_pso.rules.base import State


class OwnRuleConfig(RuleConfig):
    part: float = Field(default=0.5, gt=0, le=1, description="How far a particle moves to the other; 1 copies it.")


class OwnRule(Rule):
    """x_i <- x_i + part (x_j - x_i), j a living particle other than i. One that is not alive becomes x_j."""

    Config = OwnRuleConfig
    options: OwnRuleConfig

    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        rng = np.random.default_rng([self.seed, sync.index])  # so all ranks draw alike
        sources = []
        for i in range(sync.num_particles):
            others = [j for j in range(sync.num_particles) if sync.alive[j] and j != i]
            sources.append(int(rng.choice(others)) if others else i)
        return Plan(receive="one", sources=tuple(sources), alive=sync.alive)

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        if plan.alive[place.particle]:
            x.lerp_(received, self.options.part)
        else:
            x.copy_(received)
