"""NoSync: every particle trains a model of its own under a growing pressure towards the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ds_pso.rules.base import Place, Plan, Rule, RuleConfig, RuleMemory, State, SyncPoint

if TYPE_CHECKING:
    from torch import Tensor


class NoSyncConfig(RuleConfig):
    """Options of the rule ``nosync``: the subsection ``swarm.nosync``."""

    pressure: float = Field(default=0.1, ge=0, le=1, description="Pressure at the beginning of training.")
    final_pressure: float = Field(
        default=1.0, ge=0, le=1, description="Pressure at the last sync point; 1: all agree. Not for constant growth."
    )
    growth: Literal["linear", "exponential", "constant"] = Field(
        default="linear",
        description="How the pressure goes from one to the other; constant: it stays what it is at the beginning.",
    )
    asynchronous: bool = Field(
        default=False,
        description="Take the newest state that a peer has sent, and wait for nobody.",
    )
    max_staleness: int = Field(
        default=4,
        ge=0,
        description="If asynchronous: ignore the state of a peer that had completed more than so many sync points "
        "fewer.",
    )

    @model_validator(mode="after")
    def _exponential_growth_is_positive(self) -> NoSyncConfig:
        if self.growth == "exponential" and not (self.pressure > 0 and self.final_pressure > 0):
            raise ValueError(
                f'growth "exponential" needs pressure and final_pressure above 0, and they are {self.pressure:g} '
                f'and {self.final_pressure:g}; raise them, or use growth "linear"'
            )
        return self


class NoSync(Rule):
    """A pull towards the others, weak at first and complete at the end.

    With p the pressure at this point of training, m the mean of the living particles::

        x_i <- x_i + p (m - x_i)

    ``asynchronous``: m is the mean of x_i and the newest state that a peer has sent; the peers send
    to each other in turn. There is no barrier, so a slow particle delays nobody.

    Source: M. Isakov and M. A. Kinsy, "NoSync: Particle Swarm Inspired Distributed DNN Training",
    ICANN 2018, which gives the idea; the schedules of the pressure are ours. Moves one all-reduce of
    the shard, or when asynchronous one shard; keeps nothing. A particle that is not alive restarts at m.
    """

    Config = NoSyncConfig
    options: NoSyncConfig

    @property
    def uses_progress(self) -> bool:
        return self.options.growth != "constant"

    @property
    def max_staleness(self) -> int | None:
        return self.options.max_staleness if self.options.asynchronous else None

    def pressure(self, sync: SyncPoint) -> float:
        """Return p at this point of the training."""
        start, final = self.options.pressure, self.options.final_pressure
        if self.options.growth == "constant":
            return start
        if self.options.growth == "linear":
            return start + (final - start) * sync.progress
        return float(start * (final / start) ** sync.progress)

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        pressure = self.pressure(sync)
        share = pressure / 2 if self.options.asynchronous else pressure  # half-way to the peer is the mean of two
        return Plan(
            receive="newest" if self.options.asynchronous else "mean",
            weights=sync.mean_weights(),
            alive=sync.alive,
            factors=tuple((share if alive else 1.0,) for alive in sync.alive),
            note={"pressure": pressure},
        )

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        if plan.alive[place.particle]:
            x.lerp_(received, plan.factors[place.particle][0])
        else:
            x.copy_(received)
