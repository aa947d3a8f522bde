"""``ds-pso simulate``: a script with all its particles in this one process."""

from __future__ import annotations

import argparse

from ds_pso.cli.arguments import Subcommands, add_subcommand


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "simulate",
        help="run a script with all its particles in this one process",
        description="Run a script that calls ds_pso.init with all the particles of its config in this one process, "
        "each with one rank. Takes the place of a launcher: instead of `deepspeed --num_gpus 4 script.py ...` "
        "write `ds-pso simulate script.py ...`.",
        example="ds-pso simulate ds_pso/train.py --deepspeed_config ds_config_examples/zero2_swarm.json --steps 64",
    )
    parser.add_argument("script", help="Python script, such as ds_pso/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the script, and return its exit code."""
    from ds_pso.simulation import simulate_script

    return simulate_script(arguments.script, arguments.arguments)
