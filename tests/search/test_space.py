"""Coefficients against the models that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ds_pso.search.space import Space, find_blocks

LLAMA = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.mlp.weight": (16, 16),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.weight": (16, 16),
    "model.layers.1.norm.weight": (16,),
    "model.norm.weight": (16,),
}


def space(experts: int, blocks: int, *, base: bool = False) -> Space:
    return Space(tuple(f"e{k}" for k in range(experts)), {f"b{b}": (f"b{b}",) for b in range(blocks)}, base)


def test_blocks_of_a_llama():
    blocks = find_blocks(LLAMA, "layers")
    assert list(blocks) == ["embedding", "model.layers.0", "model.layers.1"]
    assert blocks["model.layers.1"][-1] == "model.norm.weight"  # its head is the embedding
    assert list(find_blocks(LLAMA | {"lm_head.weight": (64, 16)}, "layers"))[-1] == "head"
    assert find_blocks(LLAMA, "one") == {"model": tuple(LLAMA)}
    assert find_blocks(LLAMA, "tensors") == {name: (name,) for name in LLAMA}


def test_a_model_without_layers_has_a_block_for_each_tensor():
    assert find_blocks({"a.weight": (2, 2), "b.bias": (2,)}, "layers") == {
        "a.weight": ("a.weight",),
        "b.bias": ("b.bias",),
    }


@pytest.mark.parametrize("kind", ["layers", "tensors", "one"])
def test_every_tensor_is_in_one_block(kind):
    adapters = {f"base_model.model.h.{n}.lora_{ab}.weight": (4, 2) for n in range(12) for ab in "AB"}
    for shapes in (LLAMA, adapters, LLAMA | {"lm_head.weight": (64, 16)}):
        found = [name for names in find_blocks(shapes, kind).values() for name in names]
        assert sorted(found) == sorted(shapes)


@given(st.integers(2, 12), st.integers(1, 6), st.booleans())
def test_a_soup_gives_nothing_to_who_is_not_in_it(experts, blocks, base):
    """Not even what rounding leaves: the weights of an expert that is NaN must not be read."""
    s = space(experts, blocks, base=base)
    for size in range(1, experts + 1):
        weights = s.weights(s.soup(range(size)))
        assert (weights[:size] == 1 / size).all()
        assert (weights[size:] == 0).all()


@given(st.data())
def test_weights_sum_to_one_and_are_the_nearest(data):
    experts, blocks, base = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    s = space(experts, blocks, base=base)
    c = data.draw(npst.arrays(np.float64, s.shape, elements=st.floats(-3, 3)))
    weights = s.weights(c)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
    moved = weights[:experts] - c
    expected = np.zeros_like(c) if base else np.broadcast_to(moved.mean(axis=0), c.shape)
    np.testing.assert_allclose(moved, expected, atol=1e-12)  # with a base nothing, else all by the same
