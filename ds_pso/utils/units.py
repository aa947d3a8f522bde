"""Bytes and bit rates as text, in powers of ten, as networks are sold."""

from __future__ import annotations

from collections.abc import Sequence

_SIZES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def choose_prefix(value: float, prefixes: Sequence[str], at_least: float = 1.0) -> tuple[float, str]:
    """Return the first prefix that leaves a number of ``at_least`` this, with its size; if none does the last one.

    >>> choose_prefix(1500.0, ["M", "k"])
    (1000.0, 'k')
    """
    prefix = next((prefix for prefix in prefixes if value >= at_least * _SIZES[prefix]), prefixes[-1])
    return _SIZES[prefix], prefix


def human_bytes(count: float) -> str:
    """Format bytes that were counted: ``12.3 MB``."""
    size, prefix = choose_prefix(count, tuple(_SIZES))
    return f"{count / size:.{1 if prefix else 0}f} {prefix}B"


def as_bytes(count: float) -> str:
    """Format bytes that were computed, in three digits: ``1.5 GB``; the unit is no smaller than a megabyte."""
    return _three_digits(count, ("G", "M"), "B")


def as_bit_rate(bits: float) -> str:
    """Format bits per second, in three digits: ``1.33 Gbit/s``."""
    return _three_digits(bits, ("G", "M", "k"), "bit/s")


def as_count(number: float) -> str:
    """Format a number of parameters, in three digits: ``1.21 B``, ``7.5 M``."""
    size, prefix = choose_prefix(number, ("G", "M"))
    return f"{number / size:.3g} {'B' if prefix == 'G' else 'M'}"


def _three_digits(value: float, prefixes: Sequence[str], unit: str) -> str:
    size, prefix = choose_prefix(value, prefixes)
    return f"{value / size:.3g} {prefix}{unit}"
