"""Base of the layouts at ZeRO 0, where every rank of a particle holds the whole model.

The swarm still gives each rank one 1/S of it, so that S ranks share the traffic between the
particles as under ZeRO; publishing ends with the ranks of a particle sending each other their parts.
Experts under expert parallelism are shared out likewise among the ranks that hold the same ones.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ds_pso.errors import UnsupportedError
from ds_pso.shards.base import Segment, Shards, equal_parts, intersect
from ds_pso.shards.engine import Engine
from ds_pso.shards.experts import replicas_of

_Part = list[tuple[int, int, int]]  # (master, start, stop)


@dataclass(frozen=True)
class _Shared:
    """Masters that the ranks of a group hold alike, and the part of each rank."""

    group: dist.ProcessGroup
    parts: list[_Part]


class ReplicatedShards(Shards):
    """Equal parts of whole masters. A subclass names these, the parameters that lie in them, and how they are cast."""

    def __init__(self, engine: Engine) -> None:
        self._particle = engine.seq_data_parallel_group
        super().__init__(engine)

    @functools.cached_property
    def _shared(self) -> list[_Shared]:
        """All masters, by the ranks that hold them; in the same order on all ranks."""
        masters, contents = self._masters(), self._parameters()
        held_by: dict[dist.ProcessGroup, list[int]] = {}
        for number, params in enumerate(contents):
            groups = {replicas_of(param) or self._particle for param in params}
            if len(groups) > 1:
                raise UnsupportedError(
                    "a parameter group of the optimizer holds experts and other parameters; divide it with "
                    "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"
                )
            held_by.setdefault(groups.pop() if groups else self._particle, []).append(number)
        found = []
        for group, numbers in held_by.items():
            parts = equal_parts([masters[number].numel() for number in numbers], dist.get_world_size(group))
            found.append(_Shared(group, [[(numbers[i], start, stop) for i, start, stop in part] for part in parts]))
        return found

    @property
    def _own(self) -> _Part:
        """The part of this rank."""
        return [piece for shared in self._shared for piece in shared.parts[dist.get_rank(shared.group)]]

    @abstractmethod
    def _masters(self) -> Sequence[Tensor]:
        """Return those of the whole model."""

    def _flat_masters(self) -> list[Tensor]:
        masters = self._masters()
        for master in masters:
            if not master.data.is_contiguous():
                raise UnsupportedError(
                    f"a parameter of shape {tuple(master.shape)} is not contiguous in memory (channels_last?); "
                    "use ZeRO stage 1, which flattens parameters, or the contiguous memory format"
                )
        return [master.data.view(-1) for master in masters]

    @abstractmethod
    def _parameters(self) -> Sequence[Sequence[Tensor]]:
        """Return those of each master, in the order in which they lie in it."""

    @property
    def tensors(self) -> list[Tensor]:
        masters = self._flat_masters()
        return [masters[m][start:stop] for m, start, stop in self._own]

    @property
    def numels(self) -> list[int]:
        return [stop - start for _, start, stop in self._own]

    def _find_segments(self) -> list[Segment]:
        segments, contents = [], self._parameters()
        for shard, (master, start, stop) in enumerate(self._own):
            offset = 0
            for param in contents[master]:
                segments += intersect(self.name_of(param), offset, param.numel(), (start, stop), shard)
                offset += param.numel()
        return segments

    def _publish_masters(self) -> None:
        masters = self._flat_masters()
        self._share_with_local_ranks([[master] for master in masters])
        self._cast(masters)

    def named_moments(self) -> list[dict[str, Tensor]]:
        masters = self._masters()
        return [
            {name: moment[start:stop] for name, moment in self._moments_of(masters[m]).items()}
            for m, start, stop in self._own
        ]

    def moment_decays(self) -> list[dict[str, float]]:
        return [self._decays_of(m) for m, _, _ in self._own]

    def publish_moments(self) -> None:
        self._share_with_local_ranks([list(self._moments_of(master).values()) for master in self._masters()])

    def _share_with_local_ranks(self, flat: list[list[Tensor]]) -> None:
        """Each rank sends its own part of each master's tensors to the others that hold the master."""
        for shared in self._shared:
            if len(shared.parts) == 1:
                continue
            for rank, part in enumerate(shared.parts):
                source = dist.get_global_rank(shared.group, rank)
                for master, start, stop in part:
                    for tensor in flat[master]:
                        dist.broadcast(tensor[start:stop], source, group=shared.group)

    @abstractmethod
    def _cast(self, masters: list[Tensor]) -> None:
        """Bring the working weights in line with the masters."""
