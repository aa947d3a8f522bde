"""Wire formats: fp32 numbers written in fewer digits, and the error feedback that makes up for it.

Knows tensors; must not know peers. Names that need torch are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_pso.comm.compression.registry import (
    BLOCK,
    FORMATS,
    UNCOMPRESSED,
    FormatEntry,
    bytes_per_element,
    find_format,
    is_partial,
    mean_bytes,
    wire_names,
    wire_options,
)

if TYPE_CHECKING:
    from ds_pso.comm.compression.base import Differences, Format, PartialFormat
else:

    def __getattr__(name: str) -> object:
        if name not in ("Differences", "Format", "PartialFormat"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ds_pso.comm.compression import base

        return getattr(base, name)


__all__ = [
    "BLOCK",
    "FORMATS",
    "UNCOMPRESSED",
    "Differences",
    "Format",
    "FormatEntry",
    "PartialFormat",
    "bytes_per_element",
    "find_format",
    "is_partial",
    "mean_bytes",
    "wire_names",
    "wire_options",
]
