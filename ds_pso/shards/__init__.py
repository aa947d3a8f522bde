"""The master shards of a DeepSpeed engine: a module for each optimizer class, found through the registry.

Knows DeepSpeed's optimizer classes, live and saved; must not know peers or rules.
"""

from ds_pso.shards.base import Health, Segment, Shards, replace
from ds_pso.shards.engine import Engine
from ds_pso.shards.registry import check_precision, find_shards, saved_optimizer
from ds_pso.shards.saved import SavedOptimizer, SavedPartition

__all__ = [
    "Engine",
    "Health",
    "SavedOptimizer",
    "SavedPartition",
    "Segment",
    "Shards",
    "check_precision",
    "find_shards",
    "replace",
    "saved_optimizer",
]
