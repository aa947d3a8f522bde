"""The ``swarm`` section of a DeepSpeed JSON config: reading, validating, naming what is wrong."""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator

from ds_pso.config.checks import check_consistent, total_num_steps
from ds_pso.elastic.config import ElasticConfig
from ds_pso.errors import ConfigError
from ds_pso.rules import RULES, Rule, find_rule
from ds_pso.rules.base import RuleConfig
from ds_pso.sync.schedule import Schedule, ScheduleConfig, make_schedule
from ds_pso.utils.strict_model import StrictModel

ALLREDUCE = "allreduce"

ConfigSource = str | Path | Mapping[str, Any]
Model = TypeVar("Model", bound=BaseModel)


class SwarmConfig(StrictModel):
    """The ``swarm`` section. The options of a rule stand in a subsection with the rule's name."""

    particles: int | Literal["node"] = Field(default="node", description="Number of particles P, or one per node.")
    sync_mode: str = Field(
        default="local_sgd",
        description="`allreduce` (plain DeepSpeed over all ranks), the name of a rule, or your own rule as "
        "`my_module:MyRule`.",
    )
    sync_interval: int = Field(
        default=32, ge=1, description="Optimizer steps after which the whole model has met again."
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="How the interval changes: see `swarm.schedule` below."
    )
    delay: int = Field(
        default=0,
        ge=0,
        description="Apply the result of a sync point so many optimizer steps later, and exchange in the background "
        "meanwhile; 0: training waits.",
    )
    fragments: int = Field(
        default=1,
        ge=1,
        description="Cut a delayed sync point into so many fragments, which are exchanged and applied one after the "
        "other within `delay`, those first that the forward pass needs first.",
    )
    streaming: bool = Field(
        default=False,
        description="Let each fragment meet by itself, one after the other, evenly spread over the interval.",
    )
    fitness: Literal["train", "probe"] = Field(
        default="train",
        description="Loss that ranks the particles: mean training loss since the last sync, or a probe batch.",
    )
    quarantine_loss: float | None = Field(
        default=4.0,
        gt=1,
        description="Leave a particle out of a sync point, and restart it from the others, when its loss, divided by "
        "the highest so far, is more than so many times the median of the others', and no chance; `null`: never.",
    )
    quarantine_norm: float | None = Field(
        default=10.0,
        gt=1,
        description="Likewise when the norm of its weights is more than so many times the median of the others', as "
        "after a flipped bit in memory; `null`: never.",
    )
    optimizer_state: Literal["keep", "average", "reset"] = Field(
        default="keep",
        description="The optimizer's moments at a sync point: each particle keeps its own, all take their mean "
        "(with Adam 16 N (P - 1) / P bytes more), or they become zero.",
    )
    total_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps of the whole training, for rules that change over it; unless given, "
        "`scheduler.params.total_num_steps`.",
    )
    wire: Literal["fp32", "bf16", "int8", "int4"] = Field(
        default="fp32",
        description="How weights travel: as they are, or as differences to the last common state, rounded, and what "
        "rounding loses sent with the next ones.",
    )
    state_device: Literal["auto", "cpu"] = Field(
        default="auto",
        description="Where the state of the rule and of the wire lies between sync points: beside the shard, or in the "
        "memory of the host.",
    )
    state_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="How movements in that state are kept: momenta, velocities, and what the wire owes. "
        "Positions are always kept in fp32.",
    )
    bucket_mb: float = Field(default=64.0, gt=0, le=4096, description="Exchange buffer, in MiB.")
    checksums: bool = Field(
        default=False,
        description="Compare checksums after each collective between particles, and repeat what was damaged "
        "on the way.",
    )
    peer_backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="Collectives between particles: NCCL on GPUs and gloo on CPU unless named."
    )
    transport: Literal["static", "elastic"] = Field(
        default="static",
        description="`static`: all particles in one launch. `elastic`: each is a job of its own, started by "
        "`ds-pso launch`, and the others go on without it.",
    )
    elastic: ElasticConfig = Field(
        default=ElasticConfig(),
        description="When an elastic swarm goes on without a particle: see `swarm.elastic` below.",
    )
    timeout_s: float = Field(
        default=600.0, gt=0, le=10_000_000, description="Longest wait for another rank, in seconds."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random factors of the rules.")

    _rule_options: dict[str, RuleConfig] = PrivateAttr(default_factory=dict)

    @field_validator("particles", mode="before")
    @classmethod
    def _particles(cls, value: Any) -> Any:
        if value == "node" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError('must be a whole number of at least 1, or "node" for one particle per node')

    @field_validator("sync_mode")
    @classmethod
    def _sync_mode(cls, value: str) -> str:
        if value != ALLREDUCE:
            find_rule(value)
        return value

    @property
    def rule_options(self) -> RuleConfig | None:
        """Validated options of the active rule; None for ``allreduce``."""
        if self.sync_mode == ALLREDUCE:
            return None
        return self._rule_options[self.sync_mode]

    @property
    def turns(self) -> int:
        """In how many parts an interval is divided, each with a sync point for a part of the model."""
        return self.fragments if self.streaming else 1

    def build_rule(self) -> Rule | None:
        """The rule that ``sync_mode`` names; None for ``allreduce``."""
        options = self.rule_options
        return None if options is None else find_rule(self.sync_mode)(options, seed=self.seed)

    def build_schedule(self, ds_config: Mapping[str, Any]) -> Schedule:
        """When to meet."""
        return make_schedule(self.schedule, self.sync_interval // self.turns, self.training_steps(ds_config))

    def training_steps(self, ds_config: Mapping[str, Any]) -> int | None:
        """Optimizer steps of the whole training, if known: this section's, or those of DeepSpeed's scheduler."""
        steps = total_num_steps(ds_config) if self.total_steps is None else self.total_steps
        return steps if isinstance(steps, int) else None

    def resolved(self) -> dict[str, Any]:
        """The section with every default filled in, as JSON types."""
        section = self.model_dump(mode="json") | {"schedule": self.schedule.resolved()}
        if self.transport == "static":
            del section["elastic"]
        if self.rule_options is not None:
            section[self.sync_mode] = self.rule_options.model_dump(mode="json")
        return section


def find_config() -> str:
    """The path of the DeepSpeed JSON that the command line or ``accelerate launch`` names.

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
    """The config that a command line names: the last value of the first of these options that has one.

    ``--deepspeed`` is the HF Trainer's.
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


def load_config(source: ConfigSource) -> tuple[dict[str, Any], SwarmConfig]:
    """Read a DeepSpeed config and split off its swarm section.

    Args:
        source: path of a JSON file, or the config as a mapping (left unchanged).

    Returns:
        DeepSpeed's part of the config, and the validated swarm section.

    Raises:
        ConfigError: names the file, the key, the value and what is allowed.
    """
    if isinstance(source, Mapping):
        where, config = "config", copy.deepcopy(dict(source))
    else:
        where, config = str(source), _read_json(Path(source))
    section = config.pop("swarm", None)
    if section is None:
        raise ConfigError(
            f'{where}: no "swarm" section; add one, such as "swarm": {{"particles": 2, "sync_mode": "local_sgd"}}'
        )
    if not isinstance(section, dict):
        raise ConfigError(f'{where}: swarm = {section!r}: must be an object such as {{"particles": 2}}')
    modes = [*RULES, str(section.get("sync_mode"))] if ":" in str(section.get("sync_mode")) else [*RULES]
    options = {name: section.pop(name) for name in modes if name in section}
    with contextlib.suppress(ValueError):  # validation says what is wrong
        find_rule(str(section.get("sync_mode"))).complete(section)
    swarm = _validate(SwarmConfig, section, f"{where}: swarm", known=[*SwarmConfig.model_fields, *RULES])
    if swarm.sync_mode != ALLREDUCE:
        options.setdefault(swarm.sync_mode, {})
    swarm._rule_options = {
        name: _validate(find_rule(name).Config, value, f"{where}: swarm.{name}") for name, value in options.items()
    }
    check_consistent(config, swarm, where)
    return config, swarm


def is_allowed(ds_config: dict[str, Any], swarm: SwarmConfig, **changes: Any) -> bool:
    """Whether the config would be accepted with these keys of the section changed."""
    try:
        check_consistent(ds_config, swarm.model_copy(update=changes), "")
    except ConfigError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f'{path}: the key "{key}" stands twice; remove one')
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the DeepSpeed config ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file; the DeepSpeed config must be JSON") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: the DeepSpeed config must be a JSON object")
    return config


def _validate(model: type[Model], value: Any, where: str, known: list[str] | None = None) -> Model:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} = {value!r}: must be an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        keys = known or list(model.model_fields)
        raise ConfigError("; ".join(_explain(item, where, model, keys) for item in error.errors())) from error


def _explain(item: Any, where: str, model: type[BaseModel], known: list[str]) -> str:
    path = [str(part) for part in item["loc"]]
    key = path[0] if path else ""
    field = model.model_fields.get(key)
    inner = field.annotation if field and isinstance(field.annotation, type) else None
    if inner and issubclass(inner, BaseModel) and (len(path) > 1 or isinstance(item["input"], dict)):
        return _explain(item | {"loc": path[1:]}, f"{where}.{key}", inner, list(inner.model_fields))
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
