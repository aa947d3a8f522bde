"""The ``ds-pso`` command."""

from __future__ import annotations

import argparse
import sys

from ds_pso.errors import SwarmError


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
    return parser


def _simulate(arguments: argparse.Namespace) -> int:
    from ds_pso.simulate import simulate_script

    return simulate_script(arguments.script, arguments.arguments)


if __name__ == "__main__":
    sys.exit(main())
