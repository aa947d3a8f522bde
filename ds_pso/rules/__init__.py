"""The registry of sync rules, from JSON name to class. Adding a rule is adding a file and a line."""

from ds_pso.rules.base import Plan, Rule, SyncPoint
from ds_pso.rules.diloco import DiLoCo
from ds_pso.rules.local_sgd import LocalSGD
from ds_pso.rules.pso import Pso

RULES: dict[str, type[Rule]] = {
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
    "pso": Pso,
}

__all__ = ["RULES", "Plan", "Rule", "SyncPoint"]
