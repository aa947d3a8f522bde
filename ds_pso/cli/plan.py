"""``ds-pso plan``: the time that a sync point takes on a link."""

from __future__ import annotations

import argparse

from ds_pso.cli.arguments import Subcommands, add_subcommand, quantity
from ds_pso.errors import ConfigError


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "plan",
        help="how much time a sync point takes on a link, and what it takes to hide it",
        description="Compute the share of time in which training goes on, from the config, the model and the link; and "
        "the interval, the delay or the bandwidth for a given share. Nothing is started or measured.",
        example="ds-pso plan ds_config_examples/zero2_local_sgd.json --parameters 7.5M --bandwidth 100M "
        "--step-seconds 0.43",
    )
    parser.add_argument("config", help="DeepSpeed JSON config with a swarm section")
    add = parser.add_argument
    add("--parameters", type=quantity, required=True, metavar="M", help="trained parameters, such as 350M or 1.3B")
    add(
        "--bandwidth",
        type=quantity,
        required=True,
        metavar="BITS",
        help="bit/s into each particle, such as 100M or 1G",
    )
    add("--step-seconds", type=quantity, required=True, metavar="T", help="seconds of an optimizer step in a particle")
    add("--latency", type=quantity, default=0.0, metavar="T", help="seconds of a message, one way (default: 0)")
    add("--particles", type=int, metavar="P", help='number of particles, if the config says "node"')
    add("--ranks", type=int, default=1, metavar="S", help="ranks of a particle (default: 1)")
    add("--share", type=_share, default=0.95, metavar="Q", help="compute share that is wanted (default: 0.95)")
    parser.set_defaults(run=run)


def _share(text: str) -> float:
    value = quantity(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must lie between 0 and 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Print the cost of a sync point, and the settings that hide it."""
    from ds_pso.config.cost_model import Cluster, describe
    from ds_pso.config.load import load_config, name_of

    ds_config, swarm = load_config(arguments.config)
    where = name_of(arguments.config)
    if swarm.build_rule() is None:
        raise ConfigError(f'{where}: swarm.sync_mode = "allreduce": there are no sync points to plan')
    if swarm.optimizer_state == "average":
        raise ConfigError(
            f'{where}: swarm.optimizer_state = "average": how many moments travel depends on the optimizer; '
            'plan with "keep"'
        )
    particles = arguments.particles or (0 if swarm.particles == "node" else swarm.particles)
    for name, value, least in (
        ("--particles", particles, 2),
        ("--ranks", arguments.ranks, 1),
        ("--parameters", arguments.parameters, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}")
    for name in ("bandwidth", "step_seconds"):
        if getattr(arguments, name) == 0:
            raise ConfigError(f"--{name.replace('_', '-')} = 0: must be above 0")
    cluster = Cluster(
        arguments.parameters,
        particles,
        arguments.ranks,
        arguments.step_seconds,
        arguments.bandwidth,
        arguments.latency,
    )
    print(describe(cluster, ds_config, swarm, arguments.share))
    return 0
