"""Local SGD: at a sync point every particle takes the mean of all (parameter averaging)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_pso.rules.base import Place, Plan, Rule, RuleMemory, State, SyncPoint

if TYPE_CHECKING:
    from torch import Tensor


class LocalSGD(Rule):
    """x_i <- mean of x_j over the living particles j.

    Source: S. U. Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019; "PA" in
    the PSO-PS paper (arXiv 2009.03816). Moves one all-reduce of the shard and keeps no state.
    """

    @property
    def ends_equal(self) -> bool:
        return True

    @property
    def receives_the_mean(self) -> bool:
        return True

    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        return Plan(receive="mean", weights=sync.mean_weights(), alive=sync.alive)

    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        x.copy_(received)
