"""``ds-pso check``: whether a config is valid, what it resolves to, and what it costs for a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_pso.cli.arguments import add_subcommand, check_at_least, quantity
from ds_pso.config.checks import total_num_steps
from ds_pso.config.cost_model import Cluster, as_bytes, memory, plan
from ds_pso.config.schema import ALLREDUCE, SwarmConfig, load_config
from ds_pso.errors import ConfigError
from ds_pso.rules import RULES


def add_to(commands: Any) -> None:
    parser = add_subcommand(
        commands,
        "check",
        help="validate a config; for a model, memory and bytes of a sync point",
        description="Validate a DeepSpeed JSON as ds_pso.init does, and print every setting of its swarm section with "
        "what was left open filled in. Given a model, also memory per rank and bytes per sync point. Exits with 1 if "
        "the config is not valid; warnings do not count.",
        example="ds-pso check ds_config_examples/zero2_local_sgd.json --parameters 350M --ranks 8",
    )
    add = parser.add_argument
    add("config", help="DeepSpeed JSON config with a swarm section")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", help="llama:<layers>x<width> as of train.py, a local folder or a hub id; only its config is read"
    )
    model.add_argument("--parameters", type=quantity, metavar="M", help="trained parameters, such as 350M or 1.3B")
    add("--particles", type=int, metavar="P", help='number of particles, if the config says "node"')
    add("--ranks", type=int, default=1, metavar="S", help="ranks of a particle (default: 1)")
    add("--json", action="store_true", help="print one JSON object, on the last line")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    ds_config, swarm = load_config(arguments.config)
    given = json.loads(Path(arguments.config).read_text(encoding="utf-8"))["swarm"]
    found: dict[str, Any] = {
        "config": arguments.config,
        "swarm": swarm.resolved(),
        "defaults": [name for name, _ in _flat(swarm.resolved()) if not _stands_in(given, name)],
        "warnings": list(warnings(ds_config, swarm, given)),
    }
    if arguments.model is not None or arguments.parameters is not None:
        found["model"] = _cost(swarm, arguments)
    print(json.dumps(found) if arguments.json else _text(found))
    return 0


def warnings(ds_config: Mapping[str, Any], swarm: SwarmConfig, given: Mapping[str, Any]) -> Iterator[str]:
    """What is allowed, and probably not meant.

    Args:
        given: the swarm section as it was written.
    """
    mode, n = swarm.sync_mode, swarm.sync_interval
    for name in RULES:
        if name in given and name != mode:
            yield f'swarm.{name} is not used: swarm.sync_mode is "{mode}"'
    if swarm.timeout_s < 60:
        yield (
            f"swarm.timeout_s = {swarm.timeout_s:g}: a rank that loads data, compiles or evaluates for longer "
            "ends the run"
        )
    rule = swarm.build_rule()
    if rule is None:
        ignored = [name for name in given if name in SwarmConfig.model_fields and name not in _OF_ALLREDUCE]
        if ignored:
            yield f'swarm.sync_mode = "{ALLREDUCE}" is plain DeepSpeed over all ranks, and ignores {", ".join(ignored)}'
        return
    if swarm.particles == 1:
        yield "swarm.particles = 1: plain DeepSpeed; there are no sync points"
        return
    steps = swarm.total_steps or total_num_steps(ds_config)
    if isinstance(steps, int) and steps < n // swarm.turns:
        yield f"swarm.sync_interval = {n}: training ends after {steps} steps, before the particles meet"
    if n == 1 and swarm.schedule.type == "fixed":
        yield (
            'swarm.sync_interval = 1: the particles meet at every step, and move fp32 weights where "allreduce" moves '
            "gradients in the working precision"
        )
    if swarm.delay and swarm.delay == n // swarm.turns and swarm.schedule.type == "fixed":
        yield (
            f"swarm.delay = {swarm.delay}: as long as the interval, so that what a particle learns reaches the others "
            "one interval late; the shortest delay that hides the exchange costs the least"
        )
    if swarm.fitness == "probe" and not rule.uses_fitness:
        yield f'swarm.fitness = "probe": a forward pass at every sync point, and "{mode}" does not rank particles'


_OF_ALLREDUCE = {"sync_mode", "timeout_s", "peer_backend"}


def _cost(swarm: SwarmConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes of memory and of a sync point, as ``ds_pso.config.cost_model`` has them."""
    name, parameters = arguments.model, arguments.parameters
    if parameters is None:
        parameters = _count(name)
    particles = swarm.particles if arguments.particles is None else arguments.particles
    if particles == "node":
        raise ConfigError('swarm.particles = "node": how many there will be is not known here; give --particles')
    check_at_least(parameters=(parameters, 1), particles=(particles, 1), ranks=(arguments.ranks, 1))
    found = {"name": name, "parameters": parameters, "particles": particles, "ranks": arguments.ranks}
    if swarm.sync_mode == ALLREDUCE or particles == 1:
        return found | {"memory": None, "sync_point": None}
    cluster = Cluster(parameters, particles, arguments.ranks, step_s=1.0, bandwidth=1.0)
    received = 1e6 * plan(cluster, swarm).megabytes
    return found | {
        "memory": asdict(memory(cluster, swarm)),
        "sync_point": {"per_particle": received, "per_rank": received / arguments.ranks},
    }


def _count(model: str) -> int:
    from ds_pso.export.meta_model import load_model_config, num_parameters, skeleton

    if model.startswith("llama:"):
        from ds_pso.training.model import llama_config
        from ds_pso.training.text import VOCABULARY

        return num_parameters(skeleton(llama_config(model, VOCABULARY)))
    return num_parameters(skeleton(load_model_config(model)))


def _text(found: Mapping[str, Any]) -> str:
    settings = dict(_flat(found["swarm"]))
    width = max(map(len, settings))
    lines = [f"{found['config']}: valid", "", "swarm"]
    for name, value in settings.items():
        default = "  (default)" if name in found["defaults"] else ""
        lines.append(f"  {name:{width}}  {json.dumps(value)}{default}")
    lines += [f"\nwarning: {warning}" for warning in found["warnings"]]
    if "model" in found:
        lines += ["", *_cost_lines(found["model"], settings)]
    return "\n".join(lines)


def _cost_lines(model: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    name = f"{model['name']}: " if model["name"] else ""
    P, S = model["particles"], model["ranks"]
    yield f"{name}{model['parameters'] / 1e6:g} M parameters, {P} particles of {S}"
    if model["memory"] is None:
        yield "  no sync points, and nothing beside what DeepSpeed takes"
        return
    kept, pending, meeting = (as_bytes(model["memory"][key]) for key in ("kept", "pending", "meeting"))
    into = {key: as_bytes(value) for key, value in model["sync_point"].items()}
    yield f"  a sync point   {into['per_particle']} into each particle, {into['per_rank']} into each rank"
    yield f"  memory         {kept} on each rank beside DeepSpeed's own"
    if settings["delay"]:
        yield f"                 {pending} more while a sync point is pending"
    yield f"                 {meeting} more while particles meet"
    if settings["optimizer_state"] == "average":
        yield "  not counted    the optimizer's moments, which travel, too: of Adam twice what the weights take in fp32"


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``schedule.type`` for what lies in subsections."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stands_in(section: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(section, Mapping) or part not in section:
            return False
        section = section[part]
    return True
