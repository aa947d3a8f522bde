"""The ``ds-pso`` command.

What a subcommand needs is imported when it runs, so that the help comes at once.
"""

from __future__ import annotations

import argparse
import sys

from ds_pso.cli import check, export, launch, plan, report, search, simulate
from ds_pso.distributed import logs
from ds_pso.errors import SwarmError


def main(argv: list[str] | None = None) -> int:
    """Run the command; an error that ds_pso foresaw becomes one line and exit code 1."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        logs.configure(arguments.verbose)
        return int(arguments.run(arguments))
    except SwarmError as error:
        print(f"ds-pso: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-pso",
        description="Swarms of DeepSpeed ZeRO worlds.",
        epilog="`ds-pso COMMAND --help` has the arguments and an example. Errors are one line, and exit with 1.",
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more (INFO; -vv: DEBUG)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (check, plan, simulate, launch, report, export, search):
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
