"""The registry of sync rules, from JSON name to class. Adding a rule is adding a file and a line.

Rules know tensors and fitness; must not know torch.distributed, DeepSpeed or peers.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable

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
from ds_pso.rules.diloco import DiLoCo
from ds_pso.rules.easgd import Easgd
from ds_pso.rules.guarded_mean import GuardedMean
from ds_pso.rules.line_search import LineSearch
from ds_pso.rules.local_sgd import LocalSGD
from ds_pso.rules.noloco import NoLoCo
from ds_pso.rules.nosync import NoSync
from ds_pso.rules.pso import Pso

RULES: dict[str, type[Rule]] = {
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
    "easgd": Easgd,
    "noloco": NoLoCo,
    "nosync": NoSync,
    "pso": Pso,
    "swarm": GuardedMean,
    "line_search": LineSearch,
}


def find_rule(name: str, known: Iterable[str] = RULES) -> type[Rule]:
    """Return the rule with this name: a registered one, or a class named as ``my_package.my_module:MyRule``.

    Args:
        name: name in the JSON.
        known: names to suggest in the error, beside ``allreduce``.

    Raises:
        ValueError: there is none; says what is wrong.
    """
    if name in RULES:
        return RULES[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ValueError(f"must be one of allreduce, {', '.join(known)}, or your own as my_module:MyRule")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"must name a module that can be imported ({type(error).__name__}: {error}); "
            "is it installed, or its folder in PYTHONPATH?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ValueError(f"must name a subclass of ds_pso.rules.Rule, and {module_name} has none called {class_name}")
    if inspect.isabstract(found):
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"must name a complete rule, and {class_name} does not define {missing}")
    if not (isinstance(found.Config, type) and issubclass(found.Config, RuleConfig)):
        raise ValueError(f"must name a rule whose Config is a ds_pso.rules.RuleConfig, and that of {class_name} is not")
    if found.init_state is not Rule.init_state:
        raise ValueError(f"must name a rule that lists its state in initial_state; {class_name} overrides init_state")
    return found


__all__ = [
    "RULES",
    "Place",
    "Plan",
    "Rule",
    "RuleConfig",
    "RuleMemory",
    "State",
    "StateInit",
    "SyncPoint",
    "copy_of",
    "find_rule",
    "zeros_like",
]
