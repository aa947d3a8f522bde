"""``ds-pso plan``: what each way to train does on a link, and the settings that fit it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_pso.cli.arguments import (
    Subcommands,
    add_subcommand,
    bit_rate,
    check_above_zero,
    duration,
    quantity,
    share,
)
from ds_pso.cli.gpus import gpus
from ds_pso.cli.plan_inputs import DEFAULT_PARTICLES, Given, ranks_of, read_config_of, step_of
from ds_pso.cli.plan_text import advice, heading, table
from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    from ds_pso.config.recommend import Option, Planner

# Interval, wire and other keys of the rows that are always there.
_COMPARED: list[tuple[int, str, dict[str, Any]]] = [
    (32, "fp32", {}),
    (32, "int4", {}),
    (32, "int4", {"delay": 1, "fragments": 4, "streaming": True}),
    (8, "int4", {}),
    (8, "int4", {"delay": 2}),
    (4, "sparse", {}),
    (1, "sparse", {}),
]


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "plan",
        help="what each way to train does on a link, and the swarm section that fits it",
        description="Compute, for a model, the GPUs of a particle and the link between particles, the share of time "
        "in which training goes on, the bytes and the days of each way to train; and recommend a swarm section. "
        "Arithmetic: nothing is started, unless --measure is given.",
        example='ds-pso plan --model llama:24x2048 --gpus "8xH100" --tokens 256k --bandwidth 1gbit --particles 4',
    )
    add = parser.add_argument
    add("config", nargs="?", help="DeepSpeed JSON (default: the one built into train.py, in bf16 with --gpus)")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", help="llama:<layers>x<width> as of train.py, a local folder or a hub id; only its config is read"
    )
    model.add_argument("--parameters", type=quantity, metavar="M", help="trained parameters, such as 350M or 1.3B")
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--step-seconds", type=duration, metavar="T", help="time of an optimizer step in a particle")
    step.add_argument("--gpus", type=gpus, metavar="NxNAME", help="instead: the GPUs of a particle, such as 8xH100")
    step.add_argument("--measure", action="store_true", help="instead: train --model for a few steps on this machine")
    add("--tokens", type=quantity, metavar="N", help="tokens of a step in a particle, all its ranks together")
    add("--mfu", type=share, default=0.4, help="share of their peak that --gpus reach (default: %(default)s)")
    add(
        "--bandwidth",
        type=bit_rate,
        required=True,
        metavar="BITS",
        help="bit/s into each particle, such as 100M, 1gbit or 100Mbit/s",
    )
    add("--latency", type=duration, default=0.0, metavar="T", help="time of a message, one way: 20ms (default: 0)")
    add(
        "--particles",
        type=int,
        metavar="P",
        help=f"number of particles (default: the config's, or {DEFAULT_PARTICLES})",
    )
    add("--ranks", type=int, metavar="S", help="ranks of a particle (default: the number of --gpus, or 1)")
    add("--share", type=share, default=0.95, metavar="Q", help="compute share that is wanted (default: %(default)s)")
    add("--write", type=Path, metavar="FILE", help="write the config with the recommended section to a new file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what each way to train does on the link, and what is recommended."""
    from ds_pso.config.cost_model import Cluster, moments_kept
    from ds_pso.config.recommend import Planner

    check_above_zero(bandwidth=arguments.bandwidth)
    if arguments.write is not None and arguments.write.exists():
        raise ConfigError(f"--write {arguments.write}: exists already; give the name of a new file")
    given, ranks = read_config_of(arguments), ranks_of(arguments)
    step = step_of(arguments, given, ranks)
    cluster = Cluster(
        *(step.parameters, given.particles, ranks, step.seconds, arguments.bandwidth, arguments.latency),
        moments=moments_kept(given.ds_config) or (0, 0),
    )
    planner = Planner(cluster, given.ds_config, given.section, step.backend)
    print(heading(arguments.model, cluster, step))
    print(table(list(_options(planner, given)), cluster, arguments.share, arguments.tokens))
    best, is_enough = planner.recommend(arguments.share)
    print(advice(planner, best, is_enough, arguments.share))
    if arguments.write is not None:
        _write(arguments.write, given.ds_config | dict(best.changes) | {"swarm": dict(best.section)})
        print(f"written: {arguments.write}")
    return 0


def _options(planner: Planner, given: Given) -> Iterator[Option]:
    """Yield the rows of the table: the same for everybody, and at last the given section."""
    from ds_pso.config.cost_model import sync_cost
    from ds_pso.config.recommend import Option, name_of_setting

    yield from planner.every_step()
    for interval, wire, keys in _COMPARED:
        option = planner.syncing(interval, wire, **keys)
        if option is not None:
            yield option
    if given.has_section and given.swarm.build_rule() is not None:
        name = f"the config: {name_of_setting(given.swarm)}"
        yield Option(name, sync_cost(planner.cluster, given.swarm), given.section, given.swarm)


def _write(path: Path, config: Mapping[str, object]) -> None:
    from ds_pso.utils.atomic_io import write_atomically

    try:
        write_atomically(path, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--write {path}: cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error
