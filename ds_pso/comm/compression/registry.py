"""The table of wire formats, from JSON name to code and size. Adding a format is adding a file and a line.

Free of torch, so that a config can be checked and costs be computed without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_pso.comm.compression.sparse_options import SparseOptions
from ds_pso.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from ds_pso.comm.compression.base import Format

BLOCK = 256  # elements that share a scale, in the formats that write all of them
UNCOMPRESSED = "fp32"  # the wire without a format: weights travel unchanged


@dataclass(frozen=True)
class FormatEntry:
    """Where a format is defined, its size, and its options.

    Attributes:
        target: ``module:NAME`` of an instance of ``Format``, imported when a run first uses it; of a format with
            options, of what makes one of them.
        bytes_per_element: scales included; equal to ``Format.nbytes(Format.block) / Format.block``. Of a format with
            options, a function of them.
        options: class of the subsection of ``swarm`` that has the name of the format; None: it has no options.
        is_partial: true of a ``PartialFormat``.
    """

    target: str
    bytes_per_element: float | Callable[[Any], float]
    options: type[StrictModel] | None = None
    is_partial: bool = False


FORMATS: dict[str, FormatEntry] = {
    "bf16": FormatEntry("ds_pso.comm.compression.bfloat16:BF16", 2.0),
    "int8": FormatEntry("ds_pso.comm.compression.integers:INT8", 1 + 4 / BLOCK),
    "int4": FormatEntry("ds_pso.comm.compression.integers:INT4", 1 / 2 + 4 / BLOCK),
    "e3m0": FormatEntry("ds_pso.comm.compression.e3m0:E3M0", 1 / 2 + 4 / BLOCK),
    "int2": FormatEntry("ds_pso.comm.compression.int2:INT2", 1 / 4 + 4 / BLOCK),
    "sparse": FormatEntry(
        "ds_pso.comm.compression.sparse:Sparse", lambda o: o.bytes_per_element, SparseOptions, is_partial=True
    ),
}


def find_format(name: str, options: StrictModel | None = None) -> Format:
    """Return the format with this JSON name. ``UNCOMPRESSED`` has none.

    Args:
        options: of a format that has some; None: its defaults.

    Raises:
        KeyError: no such format.
    """
    entry = FORMATS[name]
    module, _, attribute = entry.target.partition(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    form: Format = found if entry.options is None else found(options or entry.options())
    return form


def wire_names() -> list[str]:
    """Return every value that ``swarm.wire`` may have."""
    return [UNCOMPRESSED, *FORMATS]


def wire_options() -> dict[str, type[StrictModel]]:
    """Return the classes of the options of those formats that have some, by name."""
    return {name: entry.options for name, entry in FORMATS.items() if entry.options is not None}


def is_partial(wire: str) -> bool:
    """Return true if a wire sends some of the elements only."""
    return wire != UNCOMPRESSED and FORMATS[wire].is_partial


def bytes_per_element(wire: str, options: StrictModel | None = None) -> float:
    """Return the bytes that one weight takes on this wire."""
    if wire == UNCOMPRESSED:
        return 4.0
    entry = FORMATS[wire]
    if entry.options is None:
        assert isinstance(entry.bytes_per_element, float)
        return entry.bytes_per_element
    assert callable(entry.bytes_per_element)
    return entry.bytes_per_element(options or entry.options())


def mean_bytes(wire: str, particles: int, options: StrictModel | None = None) -> float:
    """Return the bytes that each particle receives, for each element of a mean over the particles.

    All of them together make a sum in two phases, of which each receives what is not its own: 2 (P - 1) / P times
    the size. Where only some elements are sent, it receives what every other one sends: P - 1 times.
    """
    times = particles - 1 if is_partial(wire) else 2 * (particles - 1) / particles
    return times * bytes_per_element(wire, options)
