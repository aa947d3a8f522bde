"""The guarded mean: averaging, guarded by fitness, and a swarm over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from ds_pso.rules.base import (
    Place,
    Plan,
    Rule,
    RuleConfig,
    RuleMemory,
    State,
    StateInit,
    SyncPoint,
    copy_of,
    zeros_like,
)

if TYPE_CHECKING:
    from torch import Tensor

_NO_WEIGHT_BELOW = 0.1  # times 1 / P
_FARTHEST = math.log(1000)  # of the common learning rate from the one in the JSON
_MEMORY, _CLEARLY = 0.7, 2.5  # how evidence for a higher learning rate is kept, and how much is enough
_FEW_ROUNDS = 10  # inertia built up over so few sync points has no time to pay


class GuardedMeanConfig(RuleConfig):
    """Options of the rule ``swarm``: the subsection ``swarm.swarm``."""

    inertia: float = Field(default=0.0, ge=0, lt=1, description="Heavy-ball momentum of the consensus (beta).")
    guard: bool = Field(
        default=True,
        description="Score the particles on the probe batch; if they are unequal, let a mean weighted by their scores "
        "compete.",
    )
    fitness_steps: int = Field(
        default=32,
        ge=1,
        description="Particles are compared each time after so many optimizer steps, or at the next sync point.",
    )
    temperature: float = Field(
        default=0.3, gt=0, description="Of the loss-weighted mean (tau): weights are softmax(-loss / tau)."
    )
    unequal_above: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Losses count as unequal when a mean weighted by them would do without more than this share of "
        "the particles: 1 - 1 / (P sum of squared weights), never more than 1 - 1 / P.",
    )
    lr_spread: float = Field(
        default=1.5,
        ge=1,
        le=10,
        description="Learning rates of the particles lie between 1 / this and this times a common one; 1: all equal.",
    )
    lr_step: float = Field(
        default=2.0, ge=0, description="How far the common learning rate follows the better particles (eta)."
    )


@dataclass(frozen=True)
class _Rates:
    """Learning rates of the particles: the memory for the next sync point, and the factors; empty: unchanged."""

    memory: RuleMemory = field(default_factory=dict)
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Trial:
    """The stage that a guarded sync point has reached. Each stage but the last ends with a score."""

    stage: Literal["mean", "own", "weighted", "settle"]
    sync: SyncPoint
    memory: RuleMemory = field(default_factory=dict)  # of the last sync point
    own: Sequence[float] = ()  # scores of the particles' own weights
    mean_score: float = math.inf
    mean_in: Literal["received", "trial"] = "received"  # where the mean to settle on lies


class GuardedMean(Rule):
    """Mean of the living particles with a fitness guard, learning rates of the particles, and inertia if wanted.

    With q_i the loss of particle i's own weights on the probe batch, sums over the
    living particles::

        m   = mean of x_i
        m_w = sum w_i x_i,  w = softmax(-q / tau), 0 where that is below 0.1 / P
        m <- m_w  if the q_i are clearly unequal, and m_w has the lower loss on the probe batch
        x_i <- m, or with inertia beta > 0 and the last consensus a:  v <- beta v + (a - m);  a <- a - v;  x_i <- a

    Losses are clearly unequal when softmax(-q / tau) is clearly not uniform, or one is not finite. beta
    is 0 at the last sync point, and throughout a training of 10 sync points or fewer, if it is
    known how many there will be.

    Each particle's learning rate is multiplied by exp(mu + sigma z_i), z evenly spaced in [-1, 1] and
    shuffled when losses have been compared, sigma = ln(lr_spread), shrinking to 0 in the second half of training if
    its length is known. With h_i the utilities of the ranks of q (sum |h_i| = 1)::

        s    = sum h_i z_i;  lean <- 0.7 lean + s / (standard deviation of s if ranks were dealt by chance)
        mu  <- mu + eta sigma s    if m_w has won, or s > 0 and lean > 2.5; within +-ln(1000)

    Upwards less evidence is enough, because over a few steps a lower rate nearly always looks better.
    Without the guard there is no m_w; f, the training losses, stand for q, and being clearly unequal for
    having won.

    Source: our own. The parts: B. Polyak, 1964 (heavy ball); rank utilities as in D. Wierstra et
    al., "Natural Evolution Strategies", 2014. Moves one all-reduce of the shard, two when in
    doubt; with the guard keeps one tensor, with inertia a and v. A particle that is not alive restarts
    where the others sync.
    """

    Config = GuardedMeanConfig
    rough_state = frozenset({"momentum"})
    memory_of_particles = frozenset({"loss_sums", "z"})
    options: GuardedMeanConfig

    @property
    def uses_fitness(self) -> bool:
        return not self.options.guard and self.options.lr_spread > 1

    @property
    def uses_probe(self) -> bool:
        return self.options.guard

    @property
    def compares_rates(self) -> bool:
        return self.options.lr_spread > 1

    @property
    def ends_equal(self) -> bool:
        return True

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        state: dict[str, StateInit] = {}
        if self.options.inertia > 0:
            state = {"anchor": copy_of, "momentum": zeros_like}
        if self.options.guard:
            state["trial"] = zeros_like
        return state

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        losses, window = self._window(sync, memory)
        if losses and self.options.guard:
            return Plan(receive="nothing", alive=sync.alive, score=True, carry=_Trial("own", sync, memory))
        rates = self._learning_rates(sync, memory, losses, self._unequal(losses))
        return self._mean(sync, replace(rates, memory={**rates.memory, **window}))

    def _mean(self, sync: SyncPoint, rates: _Rates, trial: _Trial | None = None) -> Plan:
        """Return the plan for the mean: to settle on it, or to try it."""
        last = sync.is_last or (sync.total is not None and sync.total <= _FEW_ROUNDS)
        return Plan(
            receive="mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=((0.0 if last else self.options.inertia,),) * sync.num_particles,
            lr_factors=rates.factors,
            tentative=trial is not None,
            score=trial is not None,
            carry=trial or _Trial("settle", sync),
            memory=rates.memory,
        )

    def proceed(self, plan: Plan, scores: tuple[float, ...]) -> Plan:
        trial = plan.carry
        assert isinstance(trial, _Trial)
        sync = trial.sync
        score = sum(scores) / len(scores)
        if trial.stage == "own":
            own = tuple(s if alive else math.inf for s, alive in zip(scores, sync.alive, strict=True))
            broken = any(math.isinf(s) for s, alive in zip(own, sync.alive, strict=True) if alive)
            if math.isinf(min(own)) or not (broken or self._unequal(own)):
                plan = self._mean(sync, self._learning_rates(sync, trial.memory, own, False))
            else:
                plan = self._mean(sync, _Rates(), replace(trial, stage="mean", own=own))
            return replace(plan, note={"scores": own})
        if trial.stage == "mean":
            carry = replace(trial, stage="weighted", mean_score=score)
            return replace(plan, send="trial", weights=self._weigh(trial.own), carry=carry)
        believed = score < trial.mean_score
        rates = self._learning_rates(sync, trial.memory, trial.own, believed)
        return replace(
            plan,
            receive="nothing",
            send="x",
            score=False,
            lr_factors=rates.factors,
            memory=rates.memory,
            carry=_Trial("settle", sync, mean_in="received" if believed else "trial"),
            note={
                "guard": "weighted" if believed else "mean",
                "guard_scores": {"mean": trial.mean_score, "weighted": score},
                "weights": plan.weights if believed else sync.mean_weights(),
            },
        )

    def _weigh(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Return weights of the particles in the mean that competes, shape (P,)."""
        weights = _softmax(scores, self.options.temperature)
        # Exploded weights do harm in any dose.
        kept = [w if w * len(weights) >= _NO_WEIGHT_BELOW else 0.0 for w in weights]
        return tuple(w / sum(kept) for w in kept)

    def _unequal(self, losses: Sequence[float]) -> bool:
        """Return true if a mean weighted by these losses would do without a good part of the particles."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return False
        weights = _softmax(finite, self.options.temperature)
        return 1 / (len(finite) * sum(w * w for w in weights)) < 1 - self.options.unequal_above

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        trial = plan.carry
        assert isinstance(trial, _Trial)
        if trial.stage == "own":
            return
        if trial.stage == "mean":  # keep this particle's own weights
            state["trial"].copy_(x)
            x.copy_(received)
            return
        if trial.stage == "weighted":
            state["trial"].copy_(x)  # the mean
            x.copy_(received)
            return
        mean = state["trial"] if trial.mean_in == "trial" else received
        if "momentum" in state:
            anchor, momentum, beta = state["anchor"], state["momentum"], plan.factors[place.particle][0]
            momentum.mul_(beta).add_(anchor).sub_(mean)
            if beta == 0:
                anchor.copy_(mean)  # exactly, where a - (a - m) would round
            else:
                anchor.sub_(momentum)
            mean = anchor
        if mean is not x:
            x.copy_(mean)
        if "trial" in state:
            state["trial"].zero_()

    def _window(self, sync: SyncPoint, memory: RuleMemory) -> tuple[list[float], RuleMemory]:
        """Return mean losses of a full window, or none while it fills; and the window for the next sync point."""
        steps = max(1, max(sync.steps, default=self.options.fitness_steps))
        sums = memory.get("loss_sums") or [0.0] * sync.num_particles
        sums = [total + loss * steps for total, loss in zip(sums, sync.losses(), strict=True)]
        steps += memory.get("steps", 0)
        if steps < self.options.fitness_steps:
            return [], {"loss_sums": sums, "steps": steps}
        return [total / steps for total in sums], {}

    def _learning_rates(self, sync: SyncPoint, memory: RuleMemory, losses: Sequence[float], believed: bool) -> _Rates:
        """Choose the learning rates for the coming steps.

        Args:
            losses: losses that have just been compared, or none.
            believed: true if they show more than which particle had the lower learning rate.
        """
        if self.options.lr_spread == 1:
            return _Rates({}, (1.0,) * sync.num_particles)
        mu, lean = memory.get("mu", 0.0), memory.get("lean", 0.0)
        if "z" in memory and losses:
            step, by_chance = _go_with(losses, sync.alive, memory["z"])
            lean = _MEMORY * lean + step / by_chance
            if believed or (step > 0 and lean > _CLEARLY):
                mu += self.options.lr_step * memory["sigma"] * step
                mu = min(max(mu, -_FARTHEST), _FARTHEST)
        sigma = math.log(self.options.lr_spread) * (min(1.0, 2 - 2 * sync.progress) if sync.knows_progress else 1)
        even = np.linspace(-1, 1, sync.num_particles) if sync.num_particles > 1 else np.zeros(1)
        if "z" in memory and not losses:  # they are still being collected
            z = memory["z"]
        else:
            z = np.random.default_rng([self.seed, sync.index]).permutation(even).tolist()
        factors = tuple(math.exp(mu + sigma * value) for value in z)
        return _Rates({"mu": mu, "lean": lean, "sigma": sigma, "z": z}, factors)


def _softmax(losses: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Return softmax(-loss / temperature), shape (P,); an infinite loss gets 0, and at least one is finite."""
    lowest = min(losses)
    powers = [math.exp((lowest - loss) / temperature) for loss in losses]
    return tuple(power / sum(powers) for power in powers)


def _rank_utilities(losses: Sequence[float], alive: Sequence[bool]) -> list[float]:
    """Return utilities in equal steps, highest for the lowest loss; absolute values sum to one; the dead have 0."""
    living = [loss for loss, lives in zip(losses, alive, strict=True) if lives]
    raw = [
        sum((other > loss) - (other < loss) for other in living) if lives else 0
        for loss, lives in zip(losses, alive, strict=True)
    ]
    scale = sum(abs(value) for value in raw) or 1
    return [value / scale for value in raw]


def _go_with(losses: Sequence[float], alive: Sequence[bool], z: Sequence[float]) -> tuple[float, float]:
    """Return how much low losses go with high z, in [-1, 1], and its standard deviation under chance."""
    utilities = _rank_utilities(losses, alive)
    step = sum(u * value for u, value in zip(utilities, z, strict=True))
    squares = sum(u * u for u in utilities) * sum(value * value for value in z)
    return step, math.sqrt(squares / max(1, len(z) - 1)) or 1.0
