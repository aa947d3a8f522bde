"""Finds the layers of a model from the names of its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator


def find_layers(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the layer of each parameter that is in one: the name of a stack, and the layer's number there.

    A stack is what stands before a number in the names of parameters, if some name occurs also with another number in
    its place: ``model.layers``, where there are both ``model.layers.0.mlp.weight`` and ``model.layers.1.mlp.weight``.
    Of stacks in one another, such as experts in a layer, the outermost counts.
    """
    names = list(names)
    numbers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        for stack, number, below in _numbered(name):
            numbers[stack, below].add(number)
    stacks = {stack for (stack, _), found in numbers.items() if len(found) > 1}
    layers: dict[str, tuple[str, str]] = {}
    for name in names:
        for stack, number, _ in _numbered(name):
            if stack in stacks:
                layers.setdefault(name, (stack, number))
    return layers


def _numbered(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield each number in a dotted name, between what stands before and behind it."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
