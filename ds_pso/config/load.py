"""Reading a DeepSpeed JSON config: finding it, splitting off its ``swarm`` section, explaining errors."""

from __future__ import annotations

import base64
import copy
import difflib
import json
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ds_pso.comm.compression import wire_options
from ds_pso.config.checks import check_consistent
from ds_pso.config.presets import ALLREDUCE, PRESETS, apply_preset, rule_of
from ds_pso.config.schema import SwarmConfig
from ds_pso.config.swap_folders import check_nvme_paths
from ds_pso.errors import ConfigError
from ds_pso.rules import RULES, find_rule

DeepSpeedConfig = dict[str, Any]  # JSON whose keys are DeepSpeed's affair
ConfigSource = str | Path | Mapping[str, Any]
Model = TypeVar("Model", bound=BaseModel)
_BYTE_ORDER_MARK = "\ufeff"  # Windows editors begin a file with it
_BLANK = _BYTE_ORDER_MARK + " \t\r\n"


def find_config() -> str:
    """Return the path of the DeepSpeed JSON that the command line or ``accelerate launch`` names.

    Raises:
        ConfigError: neither does.
    """
    path = named_in(sys.argv[1:])
    if path is None and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path in (None, "", "none", "None"):
        raise ConfigError(
            "ds_pso.init got no config, and none is named elsewhere; give it a path or a dict, or name the JSON with "
            "--deepspeed_config on the command line or with --deepspeed_config_file to accelerate launch"
        )
    return str(path)


def named_in(arguments: Sequence[str]) -> str | None:
    """Return the config that a command line names, if any.

    ``--deepspeed_config`` counts first, then ``--deepspeed_config_file`` and the HF Trainer's ``--deepspeed``; of
    several values of an option the last.
    """
    found = {}
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        if value and not value.startswith("-"):  # ``--deepspeed`` alone is a switch of DeepSpeed's own scripts
            found[name] = value
    names = ("--deepspeed_config", "--deepspeed_config_file", "--deepspeed")
    return next((found[name] for name in names if name in found), None)


def load_config(source: ConfigSource) -> tuple[DeepSpeedConfig, SwarmConfig]:
    """Read a DeepSpeed config and split off its swarm section.

    Args:
        source: the config as DeepSpeed or Accelerate take it: see ``read_config``.

    Returns:
        DeepSpeed's part of the config, and the validated swarm section.

    Raises:
        ConfigError: names the file, the key, the value and what is allowed.
    """
    where, config = name_of(source), read_config(source)
    section = config.pop("swarm", None)
    if section is None:
        raise ConfigError(
            f'{where}: no "swarm" section; add one, such as "swarm": {{"particles": 2, "sync_mode": "local_sgd"}}'
        )
    if not isinstance(section, dict):
        raise ConfigError(f'{where}: swarm = {section!r}: must be an object such as {{"particles": 2}}')
    mode = str(section.get("sync_mode"))
    apply_preset(section)
    modes = [*RULES, *PRESETS, *([mode] if ":" in mode else [])]
    given = {name: section.pop(name) for name in modes if name in section}
    wires = {name: kind for name, kind in wire_options().items() if name in section}
    given_wires = {name: section.pop(name) for name in wires}
    known = [*SwarmConfig.model_fields, *RULES, *PRESETS, *wire_options()]
    swarm = _validate(SwarmConfig, section, f"{where}: swarm", known=known)
    if swarm.sync_mode != ALLREDUCE:
        given.setdefault(swarm.sync_mode, {})
    options = {
        name: _validate(find_rule(rule_of(name)).Config, value, f"{where}: swarm.{name}")
        for name, value in given.items()
    }
    if mode in PRESETS and mode in options:  # its own subsection goes before that of its rule
        options[swarm.sync_mode] = options[mode]
    swarm._rule_options = {name: value for name, value in options.items() if name not in PRESETS}
    swarm._wire_options = {
        name: _validate(kind, given_wires[name], f"{where}: swarm.{name}") for name, kind in wires.items()
    }
    check_consistent(config, swarm, where)
    check_nvme_paths(config, where)
    return config, swarm.with_batches_of(config)


def is_allowed(ds_config: Mapping[str, object], swarm: SwarmConfig, **changes: object) -> bool:
    """Return true if the config would be accepted with these keys of the section changed."""
    try:
        check_consistent(ds_config, swarm.model_copy(update=changes), "")
    except ConfigError:
        return False
    return True


def name_of(source: ConfigSource) -> str:
    """Return how messages call a config: by its path, or ``config`` where it has none."""
    return "config" if isinstance(source, Mapping) or _text_in(source) is not None else str(source)


def read_config(source: ConfigSource) -> DeepSpeedConfig:
    """Read a config whole, its ``swarm`` section included.

    Args:
        source: path of a file. Or the config itself: a mapping (left unchanged), JSON text as Accelerate takes it, or
            that in URL-safe base64. Like DeepSpeed's, the JSON may be Hjson: comments, a comma after the last item.

    Raises:
        ConfigError: names the file, and what is wrong with it.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    where, text = name_of(source), _text_in(source)
    config = _parse(_read_text(source, where) if text is None else text, where)
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: the DeepSpeed config must be a JSON object")
    return config


def _read_text(path: str | Path, where: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{where}: cannot read the DeepSpeed config ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not a UTF-8 text file; the DeepSpeed config must be JSON") from error
    except ValueError as error:  # of a name that no file can have
        raise ConfigError(f"{where}: cannot read the DeepSpeed config ({error}); check the path") from error


def _text_in(source: str | Path) -> str | None:
    """Return the text of a config that stands in place of a path; None: it is a path."""
    if isinstance(source, Path) or os.path.exists(source):  # noqa: PTH110 (a Path refuses long names)
        return None
    if source.lstrip(_BLANK).startswith("{"):
        return source
    try:
        text = base64.urlsafe_b64decode(source).decode("utf-8")
    except ValueError:  # not base64, or not of text
        return None
    # A path may be base64 by accident, but then what it says is no config.
    return text if text.lstrip(_BLANK).startswith(("{", "#", "/")) or "swarm" in text else None


def _parse(text: str, where: str) -> object:
    try:
        return _parse_lenient(text.removeprefix(_BYTE_ORDER_MARK), where)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(
            f"{where}: too many brackets inside one another; the DeepSpeed config must be JSON"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{where}: {error}") from error


def _parse_lenient(text: str, where: str) -> object:
    """Parse JSON, and what is none as Hjson, as DeepSpeed does."""

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f'{where}: the key "{key}" stands twice; remove one')
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        strict = error
    import hjson  # comes with DeepSpeed; most configs do not need it

    line, column, message = strict.lineno, strict.colno, strict.msg
    try:
        config = hjson.loads(text, object_pairs_hook=no_duplicates)
        if isinstance(config, dict) and text.strip():
            return config
    except IndexError:  # a comment that does not end
        pass
    except hjson.HjsonDecodeError as error:
        if text[strict.pos : strict.pos + 1] in ("#", "/"):  # else JSON says it better
            line, column, message = error.lineno, error.colno, error.msg
    raise ConfigError(f"{where}: line {line}, column {column}: {message}") from strict


def _validate(model: type[Model], value: object, where: str, known: list[str] | None = None) -> Model:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {value!r}: must be an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        keys = known or list(model.model_fields)
        raise ConfigError("; ".join(_explain(item, where, model, keys) for item in error.errors())) from error


def _explain(item: ErrorDetails, where: str, model: type[BaseModel], known: list[str]) -> str:
    path = [str(part) for part in item["loc"]]
    key = path[0] if path else ""
    field = model.model_fields.get(key)
    inner = field.annotation if field and isinstance(field.annotation, type) else None
    if inner and issubclass(inner, BaseModel) and (len(path) > 1 or isinstance(item["input"], dict)):
        return _explain({**item, "loc": item["loc"][1:]}, f"{where}.{key}", inner, list(inner.model_fields))
    entry = typing.get_args(field.annotation)[0] if field and typing.get_origin(field.annotation) is list else None
    if isinstance(entry, type) and issubclass(entry, BaseModel) and len(path) > 1:
        where, path = f"{where}.{key}[{path[1]}]", path[2:]
        return _explain({**item, "loc": tuple(path)}, where, entry, list(entry.model_fields))
    name = f"{where}.{key}" if key else where
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known keys: {', '.join(known)}"
        return f"{name}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{name}: is missing, and has no default; add it"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if item["type"] == "model_type":
        return f"{name} = {item['input']!r}: must be an object"
    if not key:  # about several keys together
        return f"{name}: {message}"
    return f"{name} = {item['input']!r}: {message if message.startswith('must') else 'must be ' + message}"
