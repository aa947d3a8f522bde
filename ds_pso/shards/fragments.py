"""Cuts the model into fragments that may be exchanged and applied one after the other; finds a rank's part of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ds_pso.shards import Segment, Shards
from ds_pso.utils.layers import find_layers

ModelFragment = Mapping[str, range]  # by name of the parameter: elements of it, flattened


@dataclass(frozen=True)
class Range:
    """Elements [start, stop) of a shard."""

    shard: int
    start: int
    stop: int

    def of(self, shards: Sequence[Tensor]) -> Tensor:
        """Return its elements, live."""
        return shards[self.shard][self.start : self.stop]


Fragment = Sequence[Range]  # a rank's part of a fragment of the model; may be empty


# -- the model, whatever its sharding ----------------------------------------------------------------


def cut_model(numels: Mapping[str, int], count: int) -> Sequence[ModelFragment]:
    """Cut parameters into ``count`` fragments, strided over the layers.

    Fragment k has the layers k, k + count, k + 2 count, ..., counted in the order of the module; what is in no layer
    (embeddings, head) fills the fragments up, one after the other in the order of the module. With M elements in all,
    each fragment has floor(M / count) or one more: what its layers have above that fills up the others, too. So every
    element is in exactly one fragment, and of each parameter a fragment has one run. A model without layers is cut into
    runs of its parameters.

    The result depends on names and sizes alone, so it is the same for any ZeRO stage and any number of ranks.

    Source: the strided pattern of A. Douillard et al., "Streaming DiLoCo with Overlapping Communication",
    arXiv 2501.18512, section 2; fragments of exactly equal size are ours.

    Args:
        numels: elements of each trained parameter, by name, in the order of the module.
        count: of fragments; may be more than there are elements, and then some are empty.
    """
    layers = find_layers(numels)
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers.values()))}
    total = sum(numels.values())
    room = [total * (k + 1) // count - total * k // count for k in range(count)]
    fragments: list[dict[str, range]] = [{} for _ in range(count)]

    def take(k: int, name: str, left: range) -> range:
        """Give fragment k as much of it as it has room for; return the rest."""
        taken, left = left[: room[k]], left[room[k] :]
        if taken:
            fragments[k][name] = taken
            room[k] -= len(taken)
        return left

    rest = {name: range(numel) for name, numel in numels.items()}
    for name, layer in layers.items():
        rest[name] = take(numbers[layer] % count, name, rest[name])
    for name, left in rest.items():
        for k in range(count):
            left = take(k, name, left)
    return fragments


# -- the part of a rank ------------------------------------------------------------------------------


def trained_numels(shards: Shards) -> dict[str, int]:
    """Return the elements of each trained parameter of the whole model, by name, in the order of the module.

    Trained is what the optimizer has: at ZeRO 0 a frozen parameter that it was given is cut, too, or one that thaws
    later would be synced by nobody.
    """
    trained = shards.trained_names()
    return {p.name: int(getattr(p.like, "ds_numel", p.like.numel())) for p in shards.whole if p.name in trained}


def cut(shards: Shards, count: int) -> list[Fragment]:
    """Return this rank's part of each of ``count`` fragments of the model, which may be empty.

    Peers hold the same slices of the model, so they have the same part. One fragment is the shards as they are, with
    their padding.
    """
    if count == 1:
        return [[Range(i, 0, numel) for i, numel in enumerate(shards.numels)]]
    return [part_of(shards.segments, fragment) for fragment in cut_model(trained_numels(shards), count)]


def part_of(segments: Sequence[Segment], fragment: ModelFragment) -> Fragment:
    """Return the part of a fragment that lies in a rank's segments.

    Args:
        segments: in ascending order of (shard, shard_start).
        fragment: of the model.

    Returns:
        Ranges in the same order; neighbours in a shard are one range.
    """
    found: list[Range] = []
    for s in segments:
        wanted = fragment.get(s.name, range(0))
        start, stop = max(wanted.start, s.param_start), min(wanted.stop, s.param_start + s.numel)
        if start >= stop:
            continue
        moved = s.shard_start - s.param_start
        begin = start + moved
        if found and (found[-1].shard, found[-1].stop) == (s.shard, begin):
            begin = found.pop().start
        found.append(Range(s.shard, begin, stop + moved))
    return found


def segments_in(fragment: Fragment, segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments of a fragment, as if each of its ranges were a shard."""
    found = []
    for number, r in enumerate(fragment):
        for s in segments:
            start, stop = max(r.start, s.shard_start), min(r.stop, s.shard_start + s.numel)
            if s.shard == r.shard and start < stop:
                moved = start - s.shard_start
                found.append(
                    replace(
                        s,
                        shard=number,
                        shard_start=start - r.start,
                        param_start=s.param_start + moved,
                        numel=stop - start,
                    )
                )
    return found


def states_in(fragment: Fragment, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the state tensors of each range, live."""
    return [{key: value[r.start : r.stop] for key, value in states[r.shard].items()} for r in fragment]
