"""The registry of searchers, from name to function. Adding one is adding a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from ds_pso.errors import ConfigError
from ds_pso.search.baselines import (
    NoOptions,
    TaskArithmeticOptions,
    best_single,
    greedy_soup,
    random_weights,
    task_arithmetic,
    uniform_soup,
)
from ds_pso.search.cma_es import CmaOptions, cma
from ds_pso.search.pso import PsoOptions, model_swarms_options, pso
from ds_pso.search.searcher import Proposals, Searcher
from ds_pso.search.space import Space
from ds_pso.utils.strict_model import StrictModel


@dataclass(frozen=True)
class Kind:
    """A searcher: how it proposes, and what options it has.

    Attributes:
        needs_base: whether it means something only relative to a base.
    """

    propose: Callable[[Space, np.random.Generator, Any], Proposals]
    options: Callable[..., StrictModel]
    needs_base: bool = False


SEARCHERS: dict[str, Kind] = {
    "pso": Kind(pso, PsoOptions),
    "model_swarms": Kind(pso, model_swarms_options),
    "cma": Kind(cma, CmaOptions),
    "random": Kind(random_weights, NoOptions),
    "greedy_soup": Kind(greedy_soup, NoOptions),
    "uniform_soup": Kind(uniform_soup, NoOptions),
    "best_single": Kind(best_single, NoOptions),
    "task_arithmetic": Kind(task_arithmetic, TaskArithmeticOptions, needs_base=True),
}


def make_options(name: str, changes: Mapping[str, object]) -> StrictModel:
    """Return the options of a searcher.

    Raises:
        ConfigError: no such searcher or option, or a value that is not allowed.
    """
    if name not in SEARCHERS:
        raise ConfigError(f"--searcher {name}: must be one of {', '.join(SEARCHERS)}")
    try:
        return SEARCHERS[name].options(**changes)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        given = f" {key}={changes.get(key)}" if key else ""
        raise ConfigError(f"--option{given}: {first['msg']} in the options of {name}; see docs/experts.md") from error


def parse_options(texts: Sequence[str]) -> dict[str, object]:
    """Return the values of ``KEY=VALUE``, each in the notation of JSON or a word.

    Raises:
        ConfigError: one is not of that form.
    """
    found: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: must be KEY=VALUE, such as inertia=0.7")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def make_searcher(name: str, space: Space, seed: int, options: StrictModel) -> Searcher:
    """Return a searcher at its beginning.

    Raises:
        ConfigError: it needs a base, and there is none.
    """
    kind = SEARCHERS[name]
    if kind.needs_base and not space.has_base:
        raise ConfigError(f"--searcher {name}: scales what experts have learnt beyond their base; give it with --base")
    return Searcher(kind.propose(space, np.random.default_rng(seed), options))
