"""``ds-pso check``: validate a config, print its settings in full, and its cost for a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ds_pso.cli.arguments import Subcommands, add_subcommand, check_at_least, quantity
from ds_pso.cli.model_size import count_parameters
from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    from ds_pso.config.cost_model import Memory
    from ds_pso.config.schema import SwarmConfig

_OF_ALLREDUCE = {"sync_mode", "timeout_s", "peer_backend"}


@dataclass(frozen=True)
class SyncTraffic:
    """Bytes that a sync point brings, of moments with a period of their own on average.

    Attributes:
        moments: what of ``per_particle`` the optimizer's moments are; None: it is not known how many it keeps, and
            they are not counted.
    """

    per_particle: float
    per_rank: float
    moments: float | None


@dataclass(frozen=True)
class ModelCost:
    """Costs of a config for a model; None where there are no sync points."""

    name: str | None
    parameters: float
    particles: int
    ranks: int
    memory: Memory | None = None
    sync_point: SyncTraffic | None = None


@dataclass(frozen=True)
class Findings:
    """The answer of the command, and with ``--json`` its keys.

    Attributes:
        config: path of the JSON; ``config`` where the text itself was given.
        swarm: every setting of the section.
        defaults: settings that the file leaves open, such as ``schedule.type``.
        warnings: sentences.
        model: costs, if a model was given.
    """

    config: str
    swarm: Mapping[str, object]
    defaults: list[str]
    warnings: list[str]
    model: ModelCost | None

    def to_json(self) -> dict[str, object]:
        """Return a JSON object; without ``model`` where none was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
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
    """Print the settings, warnings and costs."""
    from ds_pso.config.load import load_config, name_of, read_config

    ds_config, swarm = load_config(arguments.config)
    given = read_config(arguments.config)["swarm"]
    settings = swarm.resolved()
    found = Findings(
        config=name_of(arguments.config),
        swarm=settings,
        defaults=[name for name, _ in _flat(settings) if not _stands_in(given, name)],
        warnings=list(warnings(ds_config, swarm, given)),
        model=None if arguments.model is None and arguments.parameters is None else _cost(ds_config, swarm, arguments),
    )
    print(json.dumps(found.to_json()) if arguments.json else _text(found))
    return 0


def warnings(ds_config: Mapping[str, object], swarm: SwarmConfig, given: Mapping[str, object]) -> Iterator[str]:
    """Yield a warning for each setting that is allowed and probably not meant.

    Args:
        ds_config: DeepSpeed's part of the config.
        swarm: the swarm section.
        given: the swarm section as it was written.
    """
    from ds_pso.comm.compression import UNCOMPRESSED, wire_options
    from ds_pso.config.schema import ALLREDUCE, SwarmConfig, total_num_steps
    from ds_pso.rules import RULES

    mode, n = swarm.sync_mode, swarm.sync_interval
    for key, value, names in (("sync_mode", mode, RULES), ("wire", swarm.wire, wire_options())):
        for name in names:
            if name in given and name != value:
                yield f'swarm.{name} is not used: swarm.{key} is "{value}"'
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
    alone = swarm.particles == 1
    if alone and not swarm.has_sync_points(1):
        yield "swarm.particles = 1: plain DeepSpeed; there are no sync points"
        return
    if alone and swarm.keys_for_peers():
        unused = ", ".join(f"swarm.{name}" for name in swarm.keys_for_peers())
        yield f"one particle has nobody to exchange with, so these have no effect: {unused}"
        swarm = swarm.without_peers()
    steps = swarm.total_steps or total_num_steps(ds_config)
    if isinstance(steps, int) and steps < n // swarm.turns and not swarm.never_syncs:
        yield f"swarm.sync_interval = {n}: training ends after {steps} steps, before the first sync point"
    if n == 1 and swarm.schedule.type == "fixed" and swarm.wire == UNCOMPRESSED and not alone:
        yield (
            'swarm.sync_interval = 1: the particles sync at every step, and move fp32 weights where "allreduce" moves '
            "gradients in the working precision"
        )
    if swarm.delay and swarm.delay == n // swarm.turns and swarm.schedule.type == "fixed":
        yield (
            f"swarm.delay = {swarm.delay}: as long as the interval, so that what a particle learns reaches the others "
            "one interval late; the shortest delay that hides the exchange costs the least"
        )
    if swarm.fitness == "probe" and not rule.uses_fitness:
        yield f'swarm.fitness = "probe": a forward pass at every sync point, and "{mode}" does not rank particles'


def _cost(ds_config: Mapping[str, object], swarm: SwarmConfig, arguments: argparse.Namespace) -> ModelCost:
    """Return the bytes of memory and of a sync point, computed by ``ds_pso.config.cost_model``."""
    from ds_pso.config.cost_model import Cluster, memory, moments_kept, sync_cost

    name, parameters = arguments.model, arguments.parameters
    if parameters is None:
        parameters = count_parameters(name)
    particles = swarm.particles if arguments.particles is None else arguments.particles
    if particles == "node":
        raise ConfigError('swarm.particles = "node": how many there will be is not known here; give --particles')
    check_at_least(parameters=(parameters, 1), particles=(particles, 1), ranks=(arguments.ranks, 1))
    if not swarm.has_sync_points(particles):
        return ModelCost(name, parameters, particles, arguments.ranks)
    if particles == 1:
        swarm = swarm.without_peers()
    moments = moments_kept(ds_config)
    cluster = Cluster(parameters, particles, arguments.ranks, step_s=1.0, bandwidth=1.0, moments=moments or (0, 0))
    received = 1e6 * sync_cost(cluster, swarm).megabytes
    of_moments: float | None = received - 1e6 * sync_cost(replace(cluster, moments=(0, 0)), swarm).megabytes
    if moments is None and swarm.optimizer_state == "average":
        of_moments = None
    traffic = SyncTraffic(received, received / arguments.ranks, of_moments)
    return ModelCost(name, parameters, particles, arguments.ranks, memory(cluster, swarm), traffic)


def _text(found: Findings) -> str:
    settings = dict(_flat(found.swarm))
    width = max(map(len, settings))
    lines = [f"{found.config}: valid", "", "swarm"]
    for name, value in settings.items():
        default = "  (default)" if name in found.defaults else ""
        lines.append(f"  {name:{width}}  {json.dumps(value)}{default}")
    lines += [f"\nwarning: {warning}" for warning in found.warnings]
    if found.model is not None:
        lines += ["", *_cost_lines(found.model, settings)]
    return "\n".join(lines)


def _cost_lines(model: ModelCost, settings: Mapping[str, object]) -> Iterator[str]:
    from ds_pso.utils.units import as_bytes

    name = f"{model.name}: " if model.name else ""
    yield f"{name}{model.parameters / 1e6:g} M parameters, {model.particles} particles of {model.ranks}"
    memory, traffic = model.memory, model.sync_point
    if memory is None or traffic is None:
        yield "  no sync points, and nothing beside what DeepSpeed takes"
        return
    yield (
        f"  a sync point   {as_bytes(traffic.per_particle)} into each particle, {as_bytes(traffic.per_rank)} into each "
        "rank"
    )
    if traffic.moments:
        yield f"                 {as_bytes(traffic.moments)} of it, on average, are the optimizer's moments"
    yield f"  memory         {as_bytes(memory.kept)} on each rank beside DeepSpeed's own"
    if settings["delay"]:
        yield f"                 {as_bytes(memory.pending)} more while a sync point is pending"
    yield f"                 {as_bytes(memory.exchange)} more during a sync"
    if settings["optimizer_state"] == "average" and traffic.moments is None:
        yield "  not counted    the optimizer's moments, which travel, too: of Adam twice what the weights take in fp32"


def _flat(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every key with its value; one of a subsection as ``schedule.type``."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stands_in(section: object, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(section, Mapping) or part not in section:
            return False
        section = section[part]
    return True
