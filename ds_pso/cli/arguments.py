"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import math
import textwrap
from typing import Any

from ds_pso.errors import ConfigError


def add_subcommand(commands: Any, name: str, *, help: str, description: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose help ends with an example. Its default ``run`` is called with the parsed arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def quantity(text: str) -> float:
    factors = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    factor = factors.get(text[-1:], 1.0)
    try:
        value = float(text[:-1] if text[-1:] in factors else text) * factor
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number such as 0.5, 1e9, 350M or 1.3B")
    return value


def check_at_least(**values: tuple[float, float]) -> None:
    """Of arguments by name: (value, the least that is allowed). Raises ConfigError."""
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigError(f"--{name} = {value}: must be at least {least}")
