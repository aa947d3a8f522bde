"""The space that is searched: one coefficient per expert and block of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ds_pso.utils.layers import find_layers

Coefficients = NDArray[np.float64]  # shape (experts, blocks)
BlockKind = Literal["layers", "tensors", "one"]

_ROUNDING = 1e-12  # what a sum of coefficients may lack of 1


@dataclass(frozen=True)
class Space:
    """Coefficients c of shape (K, B), and the models that they stand for.

    In block b the model is base_b + sum_k c[k, b] (expert_k,b - base_b). Without a base it is sum_k w[k, b] expert_k,b
    with w[k, b] = c[k, b] + (1 - sum_j c[j, b]) / K, the nearest numbers that sum to 1.

    Attributes:
        experts: their names.
        blocks: the names of the tensors in each block.
        has_base: whether there is a base.
    """

    experts: tuple[str, ...]
    blocks: Mapping[str, tuple[str, ...]]
    has_base: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(K, B)"""
        return len(self.experts), len(self.blocks)

    def one_hot(self, expert: int) -> Coefficients:
        """Return the coefficients of one expert as it is."""
        return self.soup([expert])

    def uniform(self) -> Coefficients:
        """Return the coefficients of the mean of all experts."""
        return self.soup(range(len(self.experts)))

    def soup(self, members: Sequence[int]) -> Coefficients:
        """Return the coefficients of the mean of some experts; one may be in it several times."""
        counts = np.bincount(members, minlength=len(self.experts)).astype(np.float64)
        return np.repeat(counts[:, None] / len(members), len(self.blocks), axis=1)

    def origin(self) -> Coefficients:
        """Return zeros: the base."""
        return np.zeros(self.shape)

    def weights(self, c: Coefficients) -> NDArray[np.float64]:
        """Return the weights of the experts, and last of the base if there is one; each column sums to 1.

        Returns:
            shape (K, B), with a base (K + 1, B).
        """
        rest = 1.0 - c.sum(axis=0, keepdims=True)
        rest[np.abs(rest) < _ROUNDING] = 0.0  # who has no part in a soup gets none from rounding
        return np.concatenate([c, rest]) if self.has_base else c + rest / len(self.experts)


def find_blocks(shapes: Mapping[str, Sequence[int]], kind: BlockKind) -> dict[str, tuple[str, ...]]:
    """Divide the tensors of a model into blocks.

    ``layers``: each layer is a block; what stands before the first one is the block ``embedding``, the rest is the
    block ``head``. A head that has no matrix, such as a last norm, belongs to the last layer. Where no layers are
    found, each tensor is a block.

    Args:
        shapes: of all tensors by name, in the order of the module.
        kind: ``layers``, ``tensors`` (each is a block) or ``one`` (block for all).
    """
    if kind == "one":
        return {"model": tuple(shapes)}
    layers = find_layers(shapes)
    if kind == "tensors" or not layers:
        return {name: (name,) for name in shapes}
    found: dict[str, list[str]] = {}
    seen = False
    for name in shapes:
        seen = seen or name in layers
        block = ".".join(filter(None, layers[name])) if name in layers else "head" if seen else "embedding"
        found.setdefault(block, []).append(name)
    if all(len(shapes[name]) < 2 for name in found.get("head", ())):
        last = ".".join(filter(None, list(layers.values())[-1]))
        found[last] += found.pop("head", [])
    return {block: tuple(names) for block, names in found.items()}
