"""A checkpoint as the ranks of this run would have saved it, where it was saved with other P or S.

New particle j continues old particle j mod P; see docs/checkpoints.md for what is kept, and what begins anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from ds_pso.checkpoint.deepspeed_reshard import RepartitionedFiles, check_same_model, repartitioned
from ds_pso.checkpoint.format import (
    RandomRecord,
    RankRecord,
    check_files,
    parse_record,
    rank_stem,
    record_of,
    weights_only,
)
from ds_pso.checkpoint.reader import Flat, SavedParticle
from ds_pso.errors import CheckpointError
from ds_pso.sampler import SwarmSampler
from ds_pso.session.session import Session
from ds_pso.shards import Segment, Shards, find_shards
from ds_pso.shards.engine import tensor_parallel_size
from ds_pso.shards.fragments import ModelFragment, cut_model, part_of, trained_numels
from ds_pso.sync.fitness import NO_LOSSES, WindowState

T = TypeVar("T")


def is_of_another_shape(session: Session, source: Path) -> bool:
    """True if checkpoint ``source`` has other P or S than this run, or this rank another share of the samples."""
    layout = session.world.layout
    if _shape(source) != (layout.num_particles, layout.particle_size):
        return True
    mine = record_of(source, layout.rank)  # particles may have shares of their own
    return any(map(SwarmSampler.is_shared_otherwise, session.samplers, mine["samplers"]))


def _shape(source: Path) -> tuple[int, int]:
    """Return P and S, as any of the ranks has recorded them."""
    record = _any_record(source)
    return record["num_particles"], record["particle_size"]


def _any_record(source: Path) -> RankRecord:
    path = next(iter(sorted((source / "swarm").glob("rank_*.json"))), None)
    if path is None:
        raise CheckpointError(f"{source}: holds no record of any rank; resume from another step_* folder")
    return parse_record(path)


class Reshaped:
    """The state that this rank restores. Made by ``open``; ``read`` follows when all ranks have checked their files.

    Attributes:
        record: as ``checkpoint.save`` writes it; its "random" is None where this rank had no predecessor.
        folder: of the particle that this one continues.
        begins_anew: what was saved has never synced, as one particle by most rules.
        wire_begins_anew: only the rule goes on: one particle had no wire.
    """

    def __init__(
        self,
        session: Session,
        source: Path,
        shape: tuple[int, int],
        records: Sequence[RankRecord],
        random: RandomRecord | None,
    ) -> None:
        """``records`` are those of the old particle that this one continues; ``random`` that of this rank."""
        self._session, self._source, self._records = session, source, records
        self._P, self._S = shape
        self._old = session.world.layout.particle % self._P
        self.folder = source / f"particle_{self._old}"
        synchronizer = session.synchronizer
        self.begins_anew = synchronizer is not None and records[0]["synchronizer"] is None
        self.wire_begins_anew = (
            self._P == 1 and synchronizer is not None and synchronizer.parts.updater.differences is not None
        )
        self.record = self._own_record()
        self.record["random"] = random
        self._files: RepartitionedFiles | None = None

    @classmethod
    def open(cls, session: Session, source: Path) -> Reshaped:
        """Read the records, and check the files of this rank's share.

        Raises:
            CheckpointError: missing or damaged, or does not say where parameters lie.
        """
        layout = session.world.layout
        P, S = _shape(source)
        first = layout.particle % P * S
        records = [record_of(source, rank) for rank in range(first, first + S)]
        if any(record.get("shards") is None for record in records):
            raise CheckpointError(
                f"{source}: does not say where the parameters of its engine lie, so it cannot be brought to another "
                "number of ranks; resume on as many as it was saved with"
            )
        if any(record["tensor_parallel"] > 1 for record in records) or tensor_parallel_size(session.engine) > 1:
            raise CheckpointError(
                f"{source}: layers are or were split over ranks (tensor_parallel.autotp_size), and are not divided "
                "anew; resume with the particles, ranks per particle and autotp_size that it was saved with"
            )
        local_ranks = session.world.coordinator.local_ranks_on_this_node
        for record in records[local_ranks.index(layout.rank) :: len(local_ranks)]:
            check_files(record["files"], source)
        random = None
        if layout.rank < P * S:  # its random state lies with a rank of the same number
            predecessor = record_of(source, layout.rank)
            name = f"swarm/{rank_stem(source, layout.rank).name}.safetensors"
            check_files({name: predecessor["files"][name]}, source)
            random = predecessor["random"]
        return cls(session, source, (P, S), records, random)

    # -- numbers ------------------------------------------------------------------------------

    def _own_record(self) -> RankRecord:
        layout = self._session.world.layout
        record = self._records[layout.shard_rank % self._S].copy()
        record["num_particles"], record["particle_size"] = layout.num_particles, layout.particle_size
        if 1 in (self._P, layout.num_particles):  # which exchanges nothing
            record["wire"], record["turns"] = self._session.config.wire, self._session.config.turns
        if len(record["samplers"]) == len(self._session.samplers):
            pairs = zip(self._session.samplers, record["samplers"], strict=True)
            record["samplers"] = [sampler.continued(state) for sampler, state in pairs]
        if self.begins_anew:
            record["window"], record["synchronizer"] = NO_LOSSES, None
        else:
            record["window"] = self._window([other["window"] for other in self._records])
            record["synchronizer"] = self._synchronizer(record["synchronizer"])
        return record

    def _shared_out(self, numbers: Sequence[float]) -> float:
        """One number of each old rank of the particle -> this rank's, so that the sum over the particle stays."""
        layout = self._session.world.layout
        return sum(numbers[layout.shard_rank :: layout.particle_size])

    def _window(self, windows: Sequence[WindowState]) -> WindowState:
        """See ``FitnessWindow.state``; all ranks of a particle have made the same steps, and their first losses count
        as their mean.
        """
        totals, counts, steps, firsts = zip(*windows, strict=True)
        known = [first for first in firsts if first is not None]
        first = sum(known) / len(known) if known else None
        return self._shared_out(totals), round(self._shared_out(counts)), steps[0], first

    def _per_particle(self, values: Sequence[T]) -> list[T]:
        return [values[particle % self._P] for particle in range(self._session.num_particles)]

    def _synchronizer(self, mine: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """See ``Synchronizer.state_dict``."""
        synchronizer = self._session.synchronizer
        if mine is None or synchronizer is None:
            return None
        per_particle = synchronizer.parts.rule.memory_of_particles
        state = dict(mine)
        state["last_losses"] = self._per_particle(state["last_losses"])
        memories = [
            {key: self._per_particle(value) if key in per_particle else value for key, value in memory.items()}
            for memory in state["rule_memories"]
        ]
        state["rule_memories"] = [memories[turn % len(memories)] for turn in range(self._session.config.turns)]
        of_all = [record["synchronizer"] or {} for record in self._records]
        state["totals"] = state["totals"] | {
            "bytes_received": self._shared_out([other["totals"]["bytes_received"] for other in of_all])
        }
        if state["pending"]:
            state["pending"] = self._pending(state["pending"], [other["pending"] for other in of_all])
        return state

    def _pending(self, mine: Mapping[str, Any], of_all: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Continue a pending sync: its fragments are of the model, so they are the same on any number of ranks."""
        record = {key: value for key, value in mine["record"].items() if not isinstance(value, list | dict)}
        record |= {key: self._per_particle(mine["record"][key]) for key in ("losses", "alive")}
        columns = zip(*(pending["distances"] for pending in of_all), strict=True)
        return {
            **mine,
            "record": record,
            "lr_factors": self._per_particle(mine["lr_factors"]) if mine["lr_factors"] else [],
            "kinds": [],  # moments on their way are divided otherwise, and the next ones make up for them
            "window": self._window([pending["window"] for pending in of_all]),
            "distances": [self._shared_out(column) for column in columns],
        }

    # -- tensors ------------------------------------------------------------------------------

    def read(self) -> dict[str, Tensor]:
        """Return the tensors that ``checkpoint.save`` would have written.

        Raises:
            CheckpointError: another model, or an optimizer whose state cannot be divided.
        """
        layout, synchronizer = self._session.world.layout, self._session.synchronizer
        with weights_only():
            saved = SavedParticle.open(self._source, self._old, self._records)
            shards = find_shards(self._session.engine) if synchronizer is None else synchronizer.parts.shards
            check_same_model(saved, self._session.engine, shards)
            if not self._is_partitioned_alike(shards):
                self._files = repartitioned(saved, self._session.engine, shards)
        old_rank = layout.shard_rank % self._S
        own = saved.own[old_rank]
        tensors = {key: own.get_tensor(key) for key in own.keys() if key.startswith("buffer.")}  # noqa: SIM118
        if synchronizer is not None and not self.begins_anew:
            parts = _SavedLikeShards(saved, self._records, shards)
            has_wire = synchronizer.parts.updater.differences is not None and not self.wire_begins_anew
            tensors |= parts.states(("rule", "wire") if has_wire else ("rule",))
            if self.record["synchronizer"] and self.record["synchronizer"]["pending"]:
                tensors |= {f"pending.{i}": value for i, value in enumerate(parts.movement(old_rank))}
        if self.record["random"] is not None:
            found = load_file(f"{rank_stem(self._source, layout.rank)}.safetensors")
            tensors |= {key: value for key, value in found.items() if key.startswith("random.")}
        return tensors

    def _is_partitioned_alike(self, shards: Shards) -> bool:
        layout = self._session.world.layout
        if layout.particle_size != self._S:
            return False
        return _segments_of(self._records[layout.shard_rank]) == list(shards.segments)

    def in_place_of_the_files(self) -> contextlib.AbstractContextManager[None]:
        """In the block ``engine.load_checkpoint`` of ``folder`` loads what this rank would have saved."""
        if self._session.is_leader and self._session.num_particles < self._P:
            warnings.warn(
                f"{self._source}: saved with {self._P} particles; what those from number {self._session.num_particles} "
                "on have learned since the last sync point is left behind",
                stacklevel=5,
            )
        if self._files is None:
            return contextlib.nullcontext()
        return self._files.in_place_of_the_files(self._session.engine)


@dataclass(frozen=True)
class _SavedLikeShards:
    """Tensors that were saved in parts like the shards of the old ranks, in parts like this rank's."""

    saved: SavedParticle
    records: Sequence[RankRecord]
    shards: Shards

    def _gather(self, dtype: torch.dtype, read: Callable[[int, int], Flat]) -> list[Tensor]:
        return self.saved.gather(self.shards.segments, self.shards.numels, dtype, read)

    def states(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return the state of the rule and of the wire, by the names that they have in ``rank_state.own_tensors``."""
        own = self.saved.own
        one_of_each = {  # (kind, name) -> values of some rank and shard
            (key.split(".", 2)[0], key.split(".", 2)[2]): ranks.get_slice(key)
            for ranks in own
            for key in ranks.keys()  # noqa: SIM118
            if key.startswith(tuple(f"{kind}." for kind in kinds))
        }
        tensors: dict[str, Tensor] = {}
        for (kind, name), values in sorted(one_of_each.items()):

            def read(rank: int, shard: int, kind: str = kind, name: str = name) -> Flat:
                return own[rank].get_slice(f"{kind}.{shard}.{name}")

            tensors |= {f"{kind}.{i}.{name}": part for i, part in enumerate(self._gather(values[:1].dtype, read))}
        return tensors

    def movement(self, old_rank: int) -> list[Tensor]:
        """See ``PendingSync.movement``.

        Args:
            old_rank: the one whose buffers this rank continues.
        """
        num_buffers, whole, means = len(self.shards.buffers()), [], []
        pending = (self.records[old_rank]["synchronizer"] or {})["pending"]
        fragments: list[ModelFragment] = []  # none: the shards as they are
        if pending["cut_into"] > 1:
            cut = cut_model(trained_numels(self.shards), pending["cut_into"])
            fragments = [cut[number] for number in pending["numbers"]]
        for own, record in zip(self.saved.own, self.records, strict=True):
            count = sum(key.startswith("pending.") for key in own.keys())  # noqa: SIM118
            movement = [own.get_tensor(f"pending.{i}") for i in range(count)]
            moved, mean = movement[: count - num_buffers], movement[count - num_buffers :]
            whole.append(_spread(moved, _segments_of(record), fragments) if fragments else moved)
            means.append(mean)
        gathered = self._gather(torch.float32, lambda rank, shard: whole[rank][shard])
        if fragments:
            parts = [part_of(self.shards.segments, fragment) for fragment in fragments]
            gathered = [r.of(gathered).clone() for part in parts for r in part]
        return [*gathered, *means[old_rank]]


def _spread(
    movement: Sequence[Tensor], segments: Sequence[Segment], fragments: Sequence[ModelFragment]
) -> list[Tensor]:
    """Return the movement of an old rank's fragments, each where it belongs in that rank's shards; zeros elsewhere."""
    sizes = [0] * (1 + max((s.shard for s in segments), default=-1))
    for s in segments:
        sizes[s.shard] = max(sizes[s.shard], s.shard_start + s.numel)
    whole = [torch.zeros(size) for size in sizes]
    ranges = [r for fragment in fragments for r in part_of(segments, fragment)]
    for r, values in zip(ranges, movement, strict=True):
        r.of(whole).copy_(values)
    return whole


def _segments_of(record: RankRecord) -> list[Segment]:
    assert record["shards"] is not None
    return [Segment(*numbers) for numbers in record["shards"]["segments"]]
