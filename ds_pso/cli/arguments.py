"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from typing import TYPE_CHECKING

from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subcommands = argparse._SubParsersAction

_BIT_RATES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}


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
    value = _number(text[:-1] if text[-1:] in factors else text) * factor
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number such as 0.5, 1e9, 350M or 1.3B")
    return value


def bit_rate(text: str) -> float:
    """Read a bandwidth in bit/s, such as 100M, 1gbit or 100Mbit/s, in powers of ten."""
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?([kmgt]?)(?:bits?|b)?(?:/s|ps)?", text, re.IGNORECASE)
    value = _number(found[1]) * _BIT_RATES[found[2].lower()] if found and "B" not in text else math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a bandwidth in bits, such as 100M, 1gbit or 100Mbit/s; of bytes give 8 times as many"
        )
    return value


def duration(text: str) -> float:
    """Read seconds: 0.5, 0.5s, 20ms or 300us."""
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?) ?(s|ms|us|)", text, re.IGNORECASE)
    value = _number(found[1]) * _SECONDS[found[2].lower()] if found else math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a time such as 0.5, 20ms or 300us; without a unit: seconds"
        )
    return value


def share(text: str) -> float:
    """Read a share between 0 and 1."""
    value = quantity(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must lie between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_at_least(**values: tuple[float, float]) -> None:
    """Check arguments, given by name as (value, least value that is allowed).

    Raises:
        ConfigError: names the first that is less.
    """
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}: must be at least {least}")


def check_above_zero(**values: float) -> None:
    """Check arguments, given by name.

    Raises:
        ConfigError: names the first that is 0.
    """
    for name, value in values.items():
        if value == 0:
            raise ConfigError(f"--{name.replace('_', '-')} = 0: must be above 0")
