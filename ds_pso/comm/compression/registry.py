"""The table of wire formats, from JSON name to code and size. Adding a format is adding a file and a line.

Free of torch, so that a config can be checked and costs be computed without it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_pso.comm.compression.base import Format

BLOCK = 256  # elements that share a scale; every format writes whole blocks
UNCOMPRESSED = "fp32"  # the wire without a format: weights travel unchanged


@dataclass(frozen=True)
class FormatEntry:
    """Where a format is defined, and its size.

    Attributes:
        target: ``module:NAME`` of an instance of ``Format``, imported when a run first uses it.
        bytes_per_element: scales included; equal to ``Format.nbytes(BLOCK) / BLOCK``.
    """

    target: str
    bytes_per_element: float


FORMATS: dict[str, FormatEntry] = {
    "bf16": FormatEntry("ds_pso.comm.compression.bfloat16:BF16", 2.0),
    "int8": FormatEntry("ds_pso.comm.compression.integers:INT8", 1 + 4 / BLOCK),
    "int4": FormatEntry("ds_pso.comm.compression.integers:INT4", 1 / 2 + 4 / BLOCK),
}


def find_format(name: str) -> Format:
    """Return the format with this JSON name. ``UNCOMPRESSED`` has none.

    Raises:
        KeyError: no such format.
    """
    module, _, attribute = FORMATS[name].target.partition(":")
    found: Format = getattr(importlib.import_module(module), attribute)
    return found


def wire_names() -> list[str]:
    """Return every value that ``swarm.wire`` may have."""
    return [UNCOMPRESSED, *FORMATS]


def bytes_per_element(wire: str) -> float:
    """Return the bytes that one weight takes on this wire."""
    return 4.0 if wire == UNCOMPRESSED else FORMATS[wire].bytes_per_element
