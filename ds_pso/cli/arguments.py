"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import math
import textwrap
from typing import TYPE_CHECKING

from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subcommands = argparse._SubParsersAction


def add_subcommand(
    commands: Subcommands, name: str, *, help: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with an example. Its default ``run`` is called with the parsed arguments."""
    return commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 100),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def quantity(text: str) -> float:
    """Read a number that may end in k, M, G, B or T."""
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
    """Check arguments, given by name as (value, least value that is allowed).

    Raises:
        ConfigError: names the first that is less.
    """
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigError(f"--{name} = {value}: must be at least {least}")
