"""Which variants of a test run always, and which with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(always: Iterable[Any], variants: Iterable[Any]) -> list[Any]:
    """``variants`` for ``parametrize``, all slow but those of ``always``; a tuple is one of several parameters."""
    always, variants = list(always), list(variants)
    assert all(variant in variants for variant in always), "a variant that there is not"
    return [
        variant
        if variant in always
        else pytest.param(*(variant if isinstance(variant, tuple) else (variant,)), marks=pytest.mark.slow)
        for variant in variants
    ]
