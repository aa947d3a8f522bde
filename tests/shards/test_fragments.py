"""Fragments of the model: every element in one of them, equally large, and the same however the model is sharded."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.shards import Segment
from ds_pso.shards.base import equal_parts, intersect
from ds_pso.shards.fragments import Range, cut_model, part_of
from ds_pso.utils.layers import find_layers

relaxed = settings(deadline=None)
counts = st.integers(1, 9)
Elements = set[tuple[str, int]]


@st.composite
def models(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of parameters: some before, in and behind layers, which may be different from one another."""
    size = st.integers(0, 12)
    numels = {f"embed.{name}": draw(st.integers(0, 60)) for name in "ab"[: draw(st.integers(0, 2))]}
    for stack in ("encoder.layers", "decoder.block")[: draw(st.integers(0, 2))]:
        for layer in range(draw(st.integers(0, 8))):
            numels |= {f"{stack}.{layer}.{name}.weight": draw(size) for name in "qkv"[: draw(st.integers(1, 3))]}
    return numels | {f"head.{name}": draw(st.integers(0, 60)) for name in "ab"[: draw(st.integers(0, 2))]}


def elements_of(fragment) -> list[tuple[str, int]]:
    return [(name, i) for name, run in fragment.items() for i in run]


def llama(layers: int, layer: int = 10, embedding: int = 30) -> dict[str, int]:
    stack = {f"model.layers.{i}.{name}.weight": layer // 2 for i in range(layers) for name in ("attn", "mlp")}
    return {"model.embed.weight": embedding, **stack, "model.norm.weight": 2, "lm_head.weight": embedding}


# -- the cut of the model -------------------------------------------------------------------


@relaxed
@given(models(), counts)
def test_every_element_is_in_exactly_one_fragment(numels, count):
    fragments = cut_model(numels, count)
    assert len(fragments) == count
    found = [element for fragment in fragments for element in elements_of(fragment)]
    assert len(found) == len(set(found))
    assert set(found) == {(name, i) for name, numel in numels.items() for i in range(numel)}


@relaxed
@given(models(), counts)
def test_fragments_are_equally_large(numels, count):
    sizes = [len(elements_of(fragment)) for fragment in cut_model(numels, count)]
    assert max(sizes) - min(sizes) <= 1


@relaxed
@given(models(), counts)
def test_a_fragment_prefers_its_own_layers(numels, count):
    """It has elements of others' only if its own are all there."""
    layers = find_layers(numels)
    order = list(dict.fromkeys(layers.values()))
    for k, fragment in enumerate(cut_model(numels, count)):
        own = {(name, i) for name, layer in layers.items() if layer in order[k::count] for i in range(numels[name])}
        mine = set(elements_of(fragment))
        assert own <= mine or mine <= own


@pytest.mark.parametrize("count", [2, 3, 4])
def test_whole_layers_in_turn_and_the_rest_in_order(count):
    numels = llama(12)
    fragments = cut_model(numels, count)
    for k, fragment in enumerate(fragments):
        layers = {name: run for name, run in fragment.items() if "layers" in name}
        mine = [i for i in range(12) if i % count == k]
        assert layers == {f"model.layers.{i}.{name}.weight": range(5) for i in mine for name in ("attn", "mlp")}
    rest = [element for fragment in fragments for element in elements_of(fragment) if "layers" not in element[0]]
    outside = ("model.embed.weight", "model.norm.weight", "lm_head.weight")
    assert rest == [(name, i) for name in outside for i in range(numels[name])]


def test_too_much_of_the_layers_fills_up_the_others():
    """Five layers of 10 in two fragments: 25 each, so half of layer 4 goes to the second."""
    numels = {f"layers.{i}.weight": 10 for i in range(5)}
    first, second = cut_model(numels, 2)
    assert first == {"layers.0.weight": range(10), "layers.2.weight": range(10), "layers.4.weight": range(5)}
    assert second == {"layers.1.weight": range(10), "layers.3.weight": range(10), "layers.4.weight": range(5, 10)}


def test_one_huge_tensor_is_cut_in_its_middle():
    fragments = cut_model({"embed.weight": 1000, "head.bias": 2}, 4)
    bounds = [0, 250, 501, 751, 1000]
    runs = [range(*pair) for pair in itertools.pairwise(bounds)]
    assert fragments == [*({"embed.weight": run} for run in runs[:3]), {"embed.weight": runs[3], "head.bias": range(2)}]


def test_more_fragments_than_elements():
    assert [len(elements_of(fragment)) for fragment in cut_model({"scale": 2}, 4)] == [0, 1, 0, 1]
    assert cut_model({}, 3) == [{}, {}, {}]


# -- layers by their names ------------------------------------------------------------------

NAMES = {
    "llama": (
        [
            "embed.weight",
            "model.layers.0.q.weight",
            "model.layers.0.o.weight",
            "model.layers.1.q.weight",
            "norm.weight",
        ],
        ["", "model.layers 0", "model.layers 0", "model.layers 1", ""],
    ),
    "experts in a layer": (
        ["layers.0.experts.0.w", "layers.0.experts.1.w", "layers.1.experts.0.w", "layers.1.experts.1.w"],
        ["layers 0", "layers 0", "layers 1", "layers 1"],
    ),
    "layers that are not quite alike": (
        ["layer1.0.conv.weight", "layer1.0.down.0.weight", "layer1.0.down.1.weight", "layer1.1.conv.weight"],
        ["layer1 0", "layer1 0", "layer1 0", "layer1 1"],
    ),
    "in a sequence with something else": (
        ["0.layers.0.w", "0.layers.1.w", "0.norm", "1.weight"],
        ["0.layers 0", "0.layers 1", "", ""],
    ),
    "a sequence": (["0.weight", "0.bias", "2.weight", "2.bias"], [" 0", " 0", " 2", " 2"]),
    "encoder and decoder": (
        ["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "decoder.block.1.w"],
        ["encoder.block 0", "encoder.block 1", "decoder.block 0", "decoder.block 1"],
    ),
    "a list of parameters": (["weights.0", "weights.1"], ["weights 0", "weights 1"]),
    "a single layer": (["embed", "layers.0.w", "head"], ["", "", ""]),
    "no numbers": (["first.weight", "last.weight", "conv1d.weight", "conv2d.weight"], [""] * 4),
}


@pytest.mark.parametrize("model", NAMES)
def test_layers_are_found_by_the_number_that_repeats(model):
    names, expected = NAMES[model]
    layers = find_layers(names)
    assert [" ".join(layers[name]) if name in layers else "" for name in names] == expected


# -- the parts of ranks ---------------------------------------------------------------------


def in_blocks(numels: dict[str, int], ranks: int) -> list[list[Segment]]:
    """As ZeRO 3: a block of each parameter, with padding behind the last ones; in two sub-groups."""
    found: list[list[Segment]] = [[] for _ in range(ranks)]
    for rank in range(ranks):
        offsets = [0, 0]
        for place, (name, numel) in enumerate(numels.items()):
            shard, block = int(place >= len(numels) // 2), -(-numel // ranks)
            start, stop = min(numel, rank * block), min(numel, (rank + 1) * block)
            if start < stop:
                found[rank].append(Segment(name, shard, offsets[shard], start, stop - start))
            offsets[shard] += block
    return found


def in_runs(numels: dict[str, int], ranks: int, groups: int = 1) -> list[list[Segment]]:
    """As ZeRO 1 and 2: a run of each parameter group."""
    found: list[list[Segment]] = [[] for _ in range(ranks)]
    for group in range(groups):
        mine = dict(list(numels.items())[group::groups])
        block = -(-sum(mine.values()) // ranks)
        for rank in range(ranks):
            offset = 0
            for name, numel in mine.items():
                found[rank] += intersect(name, offset, numel, (rank * block, (rank + 1) * block), group)
                offset += numel
    return found


def in_equal_parts(numels: dict[str, int], ranks: int) -> list[list[Segment]]:
    """As ZeRO 0: each parameter is a shard, or a part of one."""
    names = list(numels)
    return [
        [Segment(names[p], shard, 0, start, stop - start) for shard, (p, start, stop) in enumerate(part)]
        for part in equal_parts(list(numels.values()), ranks)
    ]


def elements_in(ranges: list[Range], segments: list[Segment]) -> Elements:
    """What of the model lies in these ranges of a rank; each of their elements must belong to a segment."""
    owner = {(s.shard, s.shard_start + i): (s.name, s.param_start + i) for s in segments for i in range(s.numel)}
    places = [(r.shard, i) for r in ranges for i in range(r.start, r.stop)]
    assert len(places) == len(set(places))
    return {owner[place] for place in places}


SHARDINGS = {
    "zero0": in_equal_parts,
    "zero2": in_runs,
    "zero2, two groups": lambda numels, ranks: in_runs(numels, ranks, 2),
    "zero3": in_blocks,
}


@pytest.mark.parametrize("sharding", SHARDINGS)
@relaxed
@given(models(), st.integers(1, 5), st.integers(2, 6))
def test_the_parts_of_all_ranks_are_the_fragment_of_the_model(sharding, numels, ranks, count):
    shards = SHARDINGS[sharding](numels, ranks)
    for fragment in cut_model(numels, count):
        parts = [elements_in(part_of(segments, fragment), segments) for segments in shards]
        assert sum(map(len, parts)) == len(set().union(*parts))
        assert set().union(*parts) == set(elements_of(fragment))


def test_neighbours_in_a_shard_are_one_range():
    segments = [Segment("a", 0, 0, 5, 3), Segment("b", 0, 3, 0, 4), Segment("c", 0, 9, 0, 2), Segment("d", 1, 0, 0, 2)]
    fragment = {"a": range(6, 9), "b": range(9), "c": range(1), "d": range(1, 2)}
    assert part_of(segments, fragment) == [Range(0, 1, 7), Range(0, 9, 10), Range(1, 1, 2)]
    assert part_of(segments, {"e": range(3)}) == []
