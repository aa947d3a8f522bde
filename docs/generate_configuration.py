"""Writes the tables of docs/configuration.md from the config models: ``python docs/generate_configuration.py``.

With ``--check`` it changes nothing and exits with 1 when the page is out of date.
"""

from __future__ import annotations

import json
import sys
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_pso.comm.compression import wire_names, wire_options
from ds_pso.config.presets import sync_modes
from ds_pso.config.schema import SwarmConfig
from ds_pso.distributed.transports import TRANSPORTS
from ds_pso.elastic.config import ElasticConfig
from ds_pso.rules import RULES
from ds_pso.sync.schedule import ScheduleConfig

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- begin generated -->\n", "<!-- end generated -->\n"
_SIGNS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
# What the type of a field does not say, because a validator checks it.
_BY_VALIDATOR = {
    "elastic": "object",
    "particles": 'whole number, at least 1, or `"node"`',
    "outer_lr": 'number, above 0, or `"auto"`',
    "outer_momentum": 'number, at least 0 and below 1, or `"auto"`',
    "schedule": "object",
    "sync_mode": ", ".join(f'`"{name}"`' for name in sync_modes()) + ', `"my_module:MyRule"`',
    "wire": ", ".join(f'`"{name}"`' for name in wire_names()),
    "transport": ", ".join(f'`"{name}"`' for name in TRANSPORTS),
}


def tables() -> str:
    """One table for the section itself, then one for each rule, and for each wire that has options."""
    parts = ["### `swarm`\n", _table(SwarmConfig), "### `swarm.schedule`\n", _table(ScheduleConfig)]
    parts += ["### `swarm.elastic`\n", _table(ElasticConfig)]
    for name, rule in RULES.items():
        parts.append(f"### `swarm.{name}`\n")
        parts.append(_table(rule.Config) if rule.Config.model_fields else "No options.\n")
    for name, options in wire_options().items():
        parts += [f"### `swarm.{name}`\n", _table(options)]
    return "\n".join(parts)


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model.model_fields.items():
        default = {} if isinstance(field.default, BaseModel) else field.default
        rows.append(f"| `{key}` | {_allowed(key, field)} | `{json.dumps(default)}` | {field.description} |")
    return "\n".join(rows) + "\n"


def _allowed(key: str, field: FieldInfo) -> str:
    if key in _BY_VALIDATOR:
        return _BY_VALIDATOR[key]
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in typing.get_args(field.annotation))
    kinds: dict[Any, str] = {int: "whole number", float: "number", str: "string", bool: "`true` or `false`"}
    kind, *nothing = typing.get_args(field.annotation) or [field.annotation]
    bounds = [
        f"{words} {getattr(item, attribute):,}"
        for item in field.metadata
        for kind, (attribute, words) in _SIGNS.items()
        if isinstance(item, kind)
    ]
    return ", ".join([kinds[kind], *([" and ".join(bounds)] if bounds else [])]) + (" or `null`" if nothing else "")


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
