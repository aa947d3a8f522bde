"""Cuts a rank's shards into fragments that may be exchanged and applied one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ds_pso.shards import Segment, Shards


@dataclass(frozen=True)
class Range:
    """Elements [start, stop) of a shard."""

    shard: int
    start: int
    stop: int

    def of(self, shards: Sequence[Tensor]) -> Tensor:
        """Return its elements, live."""
        return shards[self.shard][self.start : self.stop]


Fragment = Sequence[Range]


def cut(shards: Shards, count: int) -> list[Fragment]:
    """Return ``count`` fragments of equal size, those first whose parameters the forward pass needs first.

    Every element that belongs to a parameter is in exactly one of them. As the forward pass goes, so it is assumed, the
    parameters were registered in the module. One fragment is the shards as they are, with their padding.
    """
    if count == 1:
        return [[Range(i, 0, t.numel()) for i, t in enumerate(shards.tensors)]]
    return cut_segments(shards.segments, [name for name, _ in shards.module.named_parameters()], count)


def cut_segments(segments: Sequence[Segment], names: Sequence[str], count: int) -> list[Fragment]:
    """Return more than one fragment of a rank that holds these segments.

    Args:
        names: of the parameters, in their order.
    """
    order = {name: place for place, name in enumerate(names)}
    segments = sorted(segments, key=lambda s: (order[s.name], s.param_start))
    total = sum(s.numel for s in segments)
    bounds = [total * k // count for k in range(count + 1)]
    return [list(_between(segments, start, stop)) for start, stop in itertools.pairwise(bounds)]


def _between(segments: Sequence[Segment], start: int, stop: int) -> Iterator[Range]:
    """Yield the elements [start, stop) of all segments, one behind the other; neighbours in a shard are one range."""
    begin, last = 0, None
    for s in segments:
        low, high = max(start, begin) - begin, min(stop, begin + s.numel) - begin
        begin += s.numel
        if low >= high:
            continue
        here = Range(s.shard, s.shard_start + low, s.shard_start + high)
        if last and (last.shard, last.stop) == (here.shard, here.start):
            last = Range(last.shard, last.start, here.stop)
        else:
            if last:
                yield last
            last = here
    if last:
        yield last


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
