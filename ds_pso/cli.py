"""The ``ds-pso`` command."""

from __future__ import annotations

import argparse
import math
import sys

from ds_pso.errors import ConfigError, SwarmError


def main(argv: list[str] | None = None) -> int:
    """Errors that ds_pso foresaw become one line and exit code 1."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except SwarmError as error:
        print(f"ds-pso: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-pso", description="Swarms of DeepSpeed ZeRO worlds.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    simulate = commands.add_parser(
        "simulate",
        help="run a script with all its particles in this one process",
        description="Run a script that calls ds_pso.init with all the particles of its config in this one process, "
        "each with one rank. Takes the place of a launcher: instead of `deepspeed --num_gpus 4 script.py ...` "
        "write `ds-pso simulate script.py ...`.",
    )
    simulate.add_argument("script", help="Python script, such as ds_pso/train.py")
    simulate.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    simulate.set_defaults(run=_simulate)
    plan = commands.add_parser(
        "plan",
        help="how much time a sync point takes on a link, and what it takes to hide it",
        description="Compute the share of time in which training goes on, from the config, the model and the link; "
        "and the interval, the delay or the bandwidth for a given share. Nothing is started or measured.",
    )
    plan.add_argument("config", help="DeepSpeed JSON config with a swarm section")
    add = plan.add_argument
    add("--parameters", type=_quantity, required=True, metavar="M", help="trained parameters, such as 350M or 1.3B")
    add(
        "--bandwidth",
        type=_quantity,
        required=True,
        metavar="BITS",
        help="bit/s into each particle, such as 100M or 1G",
    )
    add("--step-seconds", type=_quantity, required=True, metavar="T", help="seconds of an optimizer step in a particle")
    add("--latency", type=_quantity, default=0.0, metavar="T", help="seconds of a message, one way (default: 0)")
    add("--particles", type=int, metavar="P", help='number of particles, if the config says "node"')
    add("--ranks", type=int, default=1, metavar="S", help="ranks of a particle (default: 1)")
    add("--share", type=_share, default=0.95, metavar="Q", help="compute share that is wanted (default: 0.95)")
    plan.set_defaults(run=_plan)
    return parser


def _quantity(text: str) -> float:
    factors = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    factor = factors.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if text[-1:] in factors else text) * factor
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number such as 0.5, 1e9, 350M or 1.3B")
    return value


def _share(text: str) -> float:
    value = _quantity(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must lie between 0 and 1")
    return value


def _plan(arguments: argparse.Namespace) -> int:
    from ds_pso.config import load_config
    from ds_pso.plan import Cluster, describe

    ds_config, swarm = load_config(arguments.config)
    if swarm.build_rule() is None:
        raise ConfigError(f'{arguments.config}: swarm.sync_mode = "allreduce": there are no sync points to plan')
    if swarm.optimizer_state == "average":
        raise ConfigError(
            f'{arguments.config}: swarm.optimizer_state = "average": how many moments travel depends on the optimizer; '
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


def _simulate(arguments: argparse.Namespace) -> int:
    from ds_pso.simulate import simulate_script

    return simulate_script(arguments.script, arguments.arguments)


if __name__ == "__main__":
    sys.exit(main())
