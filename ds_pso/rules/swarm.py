"""The swarm rule: averaging with inertia, guarded by fitness, and a swarm over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ds_pso.rules.base import Place, Plan, Rule, RuleConfig, State, SyncPoint

_NO_WEIGHT_BELOW = 0.1  # times 1 / P
_FARTHEST = math.log(1000)  # of the common learning rate from the one in the JSON
_FEW_ROUNDS = 10  # inertia built up over so few sync points has no time to pay


class SwarmRuleConfig(RuleConfig):
    """``swarm.swarm``"""

    inertia: float = Field(default=0.3, ge=0, lt=1, description="Heavy-ball momentum of the consensus (beta).")
    guard: bool = Field(
        default=True,
        description="Score the mean on the probe batch; in doubt, let a mean weighted by the particles' own scores "
        "compete.",
    )
    fitness_steps: int = Field(
        default=32,
        ge=1,
        description="Losses are compared over at least so many optimizer steps, if need be over several sync points.",
    )
    temperature: float = Field(
        default=0.3, gt=0, description="Of the loss-weighted mean (tau): weights are softmax(-loss / tau)."
    )
    unequal_above: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Losses count as unequal when a mean weighted by them would do without more than this share of "
        "the particles: 1 - 1 / (P sum of squared weights).",
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
    """Learning rates of the particles: what to remember of them, and the factors; empty: as before."""

    memory: Mapping[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Trial:
    """How far a guarded sync point has come. Each stage but the last ends with a score."""

    stage: Literal["mean", "own", "weighted", "settle"]
    sync: SyncPoint | None = None
    losses: Sequence[float] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)  # of the last sync point
    mean_score: float = math.inf
    rates: _Rates = _Rates()  # if the weighted mean wins
    mean_in: Literal["received", "trial"] = "received"  # where the mean to settle on lies


class SwarmRule(Rule):
    """Mean of the living particles with heavy-ball inertia, a fitness guard and particle learning rates.

    With a the last consensus, f_i the losses, sums over the living particles::

        m   = mean of x_i
        m_w = sum w_i x_i,  w = softmax(-q / tau),  q_i = loss of x_i on the probe batch;
                            0 where that is below 0.1 / P
        m <- m_w  if m_w has the lower loss on the probe batch
        u <- beta u + (a - m);  a <- a - u;  x_i <- a

    m_w is tried when there is cause for doubt, which is when softmax(-f / tau) is clearly not uniform or
    the loss of m on the probe batch is above the mean of the f_i, and w is clearly not uniform. beta
    is 0 at the last sync point, and throughout a training of 10 sync points or fewer, if the length of
    training is known.

    Each particle's learning rate is multiplied by exp(mu + sigma z_i), z evenly spaced in [-1, 1] and
    shuffled when losses have been compared, sigma = ln(lr_spread), shrinking to 0 in the second half of training if
    its length is known. When m_w has won, with u_i the utilities of the ranks of q (sum |u_i| = 1)::

        mu <- mu + eta sigma sum u_i z_i    within +-ln(1000)

    Without the guard there is no m_w, and mu moves by the ranks of f, when those are clearly unequal.

    Source: our own. The parts: B. Polyak, 1964 (heavy ball); rank utilities as in D. Wierstra et
    al., "Natural Evolution Strategies", 2014. Moves one all-reduce of the shard, two when in
    doubt; keeps a, u and, with the guard, one more. A particle that is not alive restarts at a.
    """

    Config = SwarmRuleConfig
    options: SwarmRuleConfig

    @property
    def uses_fitness(self) -> bool:
        return self.options.guard or self.options.lr_spread > 1

    @property
    def uses_probe(self) -> bool:
        return self.options.guard

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        state = {"anchor": x.detach().clone()}
        if self.options.inertia > 0:
            state["momentum"] = torch.zeros_like(x)
        if self.options.guard:
            state["trial"] = torch.zeros_like(x)
        return state

    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        losses, window = self._compare(sync, memory)
        guarded = bool(losses) and self.options.guard
        follow = bool(losses) and not guarded and self._unequal(losses)
        rates = self._learning_rates(sync, memory, bool(losses), losses if follow else ())
        beta = 0.0 if sync.is_last or (sync.total is not None and sync.total <= _FEW_ROUNDS) else self.options.inertia
        return Plan(
            receive="mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=((beta,),) * sync.num_particles,
            lr_factors=rates.factors,
            score=guarded,
            carry=_Trial("mean", sync, losses, memory) if guarded else _Trial("settle"),
            memory={**window, **rates.memory},
        )

    def proceed(self, plan: Plan, scores: tuple[float, ...]) -> Plan:
        trial: _Trial = plan.carry
        assert trial.sync is not None
        score = sum(scores) / len(scores)
        if trial.stage == "mean":
            finite = [loss for loss in trial.losses if math.isfinite(loss)]
            if not self._unequal(trial.losses) and score <= sum(finite) / max(1, len(finite)):
                return replace(plan, receive="nothing", score=False, carry=_Trial("settle"))
            return replace(plan, receive="nothing", carry=replace(trial, stage="own", mean_score=score))
        if trial.stage == "own":
            own = tuple(s if alive else math.inf for s, alive in zip(scores, trial.sync.alive, strict=True))
            broken = any(math.isinf(s) for s, alive in zip(own, trial.sync.alive, strict=True) if alive)
            if math.isinf(min(own)) or not (broken or self._unequal(own)):
                # Nobody is to blame: a false alarm, as when the model overfits.
                return replace(
                    plan,
                    receive="nothing",
                    score=False,
                    carry=_Trial("settle", mean_in="trial"),
                    note={"guard": "equal"},
                )
            rates = self._learning_rates(trial.sync, trial.memory, True, own)
            carry = replace(trial, stage="weighted", rates=rates)
            return replace(plan, receive="mean", weights=self._weigh(own), carry=carry)
        believed = score < trial.mean_score
        settled = replace(
            plan,
            receive="nothing",
            score=False,
            carry=_Trial("settle", mean_in="received" if believed else "trial"),
            note={
                "guard": "weighted" if believed else "mean",
                "weights": plan.weights if believed else trial.sync.mean_weights(),
                "guard_scores": {"mean": trial.mean_score, "weighted": score},
            },
        )
        if not believed:
            return settled
        return replace(settled, lr_factors=trial.rates.factors, memory={**plan.memory, **trial.rates.memory})

    def _weigh(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Weights of the particles in the mean that competes, shape (P,)."""
        weights = _softmax(scores, self.options.temperature)
        # Exploded weights are poison in any dose.
        kept = [w if w * len(weights) >= _NO_WEIGHT_BELOW else 0.0 for w in weights]
        return tuple(w / sum(kept) for w in kept)

    def _unequal(self, losses: Sequence[float]) -> bool:
        """Whether a mean weighted by these losses would do without a good part of the particles that have one."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return False
        weights = _softmax(finite, self.options.temperature)
        return 1 / (len(finite) * sum(w * w for w in weights)) < 1 - self.options.unequal_above

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        if plan.carry.stage == "own":  # x holds the mean, and the trial what this particle brought
            mean = x.clone()
            x.copy_(state["trial"])
            state["trial"].copy_(mean)
            return
        if plan.carry.stage == "weighted":
            x.copy_(received)
            return
        if plan.carry.stage == "mean":
            state["trial"].copy_(x)
            x.copy_(received)
            return
        mean = state["trial"] if plan.carry.mean_in == "trial" else received
        anchor, beta = state["anchor"], plan.factors[place.particle][0]
        if "momentum" in state:
            momentum = state["momentum"]
            momentum.mul_(beta).add_(anchor).sub_(mean)
            if beta == 0:
                anchor.copy_(mean)  # exactly, where a - (a - m) would round
            else:
                anchor.sub_(momentum)
        else:
            anchor.copy_(mean)
        x.copy_(anchor)
        if "trial" in state:
            state["trial"].zero_()

    def _compare(self, sync: SyncPoint, memory: Mapping[str, Any]) -> tuple[list[float], dict[str, Any]]:
        """Mean losses of a full window, or none while it fills; and the window for the next sync point."""
        steps = max(sync.steps, default=self.options.fitness_steps)
        sums = memory.get("loss_sums") or [0.0] * sync.num_particles
        sums = [total + loss * max(1, steps) for total, loss in zip(sums, sync.losses(), strict=True)]
        steps = memory.get("steps", 0) + max(1, steps)
        if steps < self.options.fitness_steps:
            return [], {"loss_sums": sums, "steps": steps}
        return [total / steps for total in sums], {}

    def _learning_rates(
        self, sync: SyncPoint, memory: Mapping[str, Any], shuffle: bool, losses: Sequence[float] = ()
    ) -> _Rates:
        """For the coming steps; the common rate follows ``losses``, if given."""
        if self.options.lr_spread == 1:
            return _Rates({}, (1.0,) * sync.num_particles)
        mu = memory.get("mu", 0.0)
        if "z" in memory and losses:
            utilities = _rank_utilities(losses, sync.alive)
            step = sum(u * z for u, z in zip(utilities, memory["z"], strict=True))
            mu += self.options.lr_step * memory["sigma"] * step
            mu = min(max(mu, -_FARTHEST), _FARTHEST)
        sigma = math.log(self.options.lr_spread) * (min(1.0, 2 - 2 * sync.progress) if sync.total else 1)
        even = np.linspace(-1, 1, sync.num_particles) if sync.num_particles > 1 else np.zeros(1)
        if "z" in memory and not shuffle:  # the losses are still being collected
            z = memory["z"]
        else:
            z = np.random.default_rng([self.seed, sync.index]).permutation(even).tolist()
        factors = tuple(math.exp(mu + sigma * value) for value in z)
        return _Rates({"mu": mu, "sigma": sigma, "z": z}, factors)


def _softmax(losses: Sequence[float], temperature: float) -> tuple[float, ...]:
    """softmax(-loss / temperature), shape (P,); an infinite loss gets 0, and at least one is finite."""
    lowest = min(losses)
    powers = [math.exp((lowest - loss) / temperature) for loss in losses]
    return tuple(power / sum(powers) for power in powers)


def _rank_utilities(losses: Sequence[float], alive: Sequence[bool]) -> list[float]:
    """From the best living particle's, highest, to the worst's; their absolute values sum to one; the dead have 0."""
    order = sorted((i for i in range(len(losses)) if alive[i]), key=lambda i: (losses[i], i))
    raw = {i: (len(order) - 1) / 2 - rank for rank, i in enumerate(order)}
    scale = sum(abs(value) for value in raw.values()) or 1.0
    return [raw.get(i, 0.0) / scale for i in range(len(losses))]
