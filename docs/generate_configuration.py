"""Writes the tables of docs/configuration.md from the config models: ``python docs/generate_configuration.py``.

With ``--check`` it changes nothing and exits with 1 when the page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_pso.comm.compression import wire_names, wire_options
from ds_pso.config.checks import EXCLUSIONS
from ds_pso.config.load import load_config
from ds_pso.config.presets import sync_modes
from ds_pso.config.schema import ParticleConfig, SwarmConfig
from ds_pso.distributed.transports import TRANSPORTS
from ds_pso.elastic.config import ElasticConfig
from ds_pso.errors import ConfigError
from ds_pso.rules import RULES
from ds_pso.sync.moment_options import MomentOptions
from ds_pso.sync.schedule import ScheduleConfig

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- begin generated -->\n", "<!-- end generated -->\n"
_GAP = re.compile(r"\{[^}]*\}")  # in a message
_SIGNS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
# What the type of a field does not say, because a validator checks it.
_BY_VALIDATOR = {
    "elastic": "object",
    "per_particle": "list of objects",
    "particles": 'whole number, at least 1, or `"node"`',
    "outer_lr": 'number, above 0, or `"auto"`',
    "outer_momentum": 'number, at least 0 and below 1, or `"auto"`',
    "moments": "object",
    "schedule": "object",
    "sync_interval": 'whole number, at least 1, or `"never"`',
    "sync_mode": ", ".join(f'`"{name}"`' for name in sync_modes()) + ', `"my_module:MyRule"`',
    "wire": ", ".join(f'`"{name}"`' for name in wire_names()),
    "transport": ", ".join(f'`"{name}"`' for name in TRANSPORTS),
}


def tables() -> str:
    """One table for the section itself, then one for each rule, and for each wire that has options."""
    parts = ["### `swarm`\n", _table(SwarmConfig), "### `swarm.schedule`\n", _table(ScheduleConfig)]
    parts += ["### `swarm.moments`\n", _table(MomentOptions)]
    parts += ["### `swarm.per_particle`\n", _table(ParticleConfig)]
    parts += ["### `swarm.elastic`\n", _table(ElasticConfig)]
    for name, rule in RULES.items():
        parts.append(f"### `swarm.{name}`\n")
        parts.append(_table(rule.Config) if rule.Config.model_fields else "No options.\n")
    for name, options in wire_options().items():
        parts += [f"### `swarm.{name}`\n", _table(options)]
    parts += ["### What goes with what\n", combinations()]
    return "\n".join(parts)


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model.model_fields.items():
        default = {} if isinstance(field.default, BaseModel) else field.default
        rows.append(f"| `{key}` | {_allowed(key, field)} | `{json.dumps(default)}` | {field.description} |")
    return "\n".join(rows) + "\n"


def _allowed(key: str, field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in typing.get_args(field.annotation))
    if key in _BY_VALIDATOR and field.annotation is not float:  # noloco has numbers where diloco takes "auto", too
        return _BY_VALIDATOR[key]
    kinds: dict[Any, str] = {int: "whole number", float: "number", str: "string", bool: "`true` or `false`"}
    kind, *nothing = typing.get_args(field.annotation) or [field.annotation]
    bounds = [
        f"{words} {getattr(item, attribute):,}"
        for item in field.metadata
        for kind, (attribute, words) in _SIGNS.items()
        if isinstance(item, kind)
    ]
    return ", ".join([kinds[kind], *([" and ".join(bounds)] if bounds else [])]) + (" or `null`" if nothing else "")


# -- what goes with what --------------------------------------------------------------------

_RULES: dict[str, dict[str, Any]] = {
    "local_sgd": {},
    "diloco": {},
    "diloco, rda": {"diloco": {"merge": "rda"}},
    "easgd": {},
    "noloco": {},
    "nosync": {"total_steps": 6400},
    "nosync, asynchronous": {"total_steps": 6400, "nosync": {"asynchronous": True}},
    "pso": {},
    "pso, ring": {"pso": {"topology": "ring"}},
    "swarm": {},
    "swarm, no guard, equal rates": {"swarm": {"guard": False, "lr_spread": 1}},
    "line_search": {},
}
_FEATURES: dict[str, dict[str, Any]] = {
    '`wire` `"bf16"`, `"int8"`, `"int4"`, `"e3m0"`, `"int2"`': {"wire": "int4"},
    '`wire` `"sparse"`': {"wire": "sparse"},
    '`residual` `"weights"`': {"wire": "int4", "residual": "weights"},
    "`delay`": {"delay": 8},
    "`delay`, `fragments`": {"delay": 8, "fragments": 4},
    "`streaming`": {"delay": 8, "fragments": 4, "streaming": True},
    "`schedule` that varies": {"schedule": {"type": "adaptive", "min_interval": 8}},
    '`optimizer_state` `"average"`': {"optimizer_state": "average"},
    '`optimizer_state` `"average"`, `moments.wire` `"int8"`': {
        "optimizer_state": "average",
        "moments": {"first_every": 3, "second_every": 6, "wire": "int8"},
    },
    '`optimizer_state` `"reset"`': {"optimizer_state": "reset"},
    '`fitness` `"probe"`': {"fitness": "probe"},
    '`transport` `"elastic"`': {"transport": "elastic"},
    "`per_particle`": {"per_particle": [{"train_micro_batch_size_per_gpu": n} for n in (8, 8, 4, 4)]},
}


def _family(feature: Mapping[str, Any]) -> str:
    """The key that two features of a kind share; they exclude, or include, one another by what they are."""
    return next(iter(feature))


def combinations() -> str:
    """Two tables: features under each rule, and features with one another under ``local_sgd``; and the reasons."""
    numbers: dict[int, int] = {}  # of a row of EXCLUSIONS -> in the list of reasons

    def cell(*sections: Mapping[str, Any]) -> str:
        row = _refused(sections)
        return "yes" if row is None else f"no, {numbers.setdefault(row, len(numbers) + 1)}"

    lines = ["Each cell is the answer of the code that checks a config; its number is that of the reason below.", ""]
    lines += [f"| | {' | '.join(f'`{rule}`' for rule in _RULES)} |", "| --- |" + " --- |" * len(_RULES)]
    for name, feature in _FEATURES.items():
        cells = [cell({"sync_mode": rule.split(",")[0]}, keys, feature) for rule, keys in _RULES.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "And with one another, with `local_sgd`:", ""]
    lines += [f"| | {' | '.join(_FEATURES)} |", "| --- |" + " --- |" * len(_FEATURES)]
    for name, feature in _FEATURES.items():
        cells = [
            "" if _family(other) == _family(feature) else cell({"sync_mode": "local_sgd"}, feature, other)
            for other in _FEATURES.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Why not:", ""]
    lines += [f"{number}. {_in_words(EXCLUSIONS[row].message)}" for row, number in numbers.items()]
    return "\n".join(lines) + "\n"


def _refused(sections: Sequence[Mapping[str, Any]]) -> int | None:
    """The row of EXCLUSIONS that refuses these keys together; None if they are allowed."""
    keys: dict[str, Any] = {"particles": 4}
    for section in sections:
        keys |= section
    try:
        load_config({"swarm": keys})
    except ConfigError as error:
        said = str(error).removeprefix("config: ")
        return next(i for i, row in enumerate(EXCLUSIONS) if re.fullmatch(_pattern(row.message), said))
    return None


def _pattern(message: str) -> str:
    """A regular expression for a message with its gaps filled in."""
    return ".*".join(map(re.escape, _GAP.split(message)))


def _in_words(message: str) -> str:
    return _GAP.sub("…", message)


def updated(page: str) -> str:
    """The page with fresh tables between the two markers."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


def main(argv: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = updated(page)
    if "--check" in argv:
        return int(page != fresh)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
