"""A checkpoint as the ranks of this run would have saved it, where it was saved with other P or S.

New particle j continues old particle j mod P; see docs/checkpoints.md for what is kept, and what begins anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ds_pso.checkpoint.deepspeed_reshard import Repartitioned, check_same_model
from ds_pso.checkpoint.format import check_files, parse_record, rank_stem, record_of, weights_only
from ds_pso.checkpoint.reader import SavedParticle
from ds_pso.errors import CheckpointError
from ds_pso.session.session import Session
from ds_pso.shards import Segment, Shards, find_shards
from ds_pso.shards.fragments import cut_segments


def is_of_another_shape(session: Session, source: Path) -> bool:
    """Whether checkpoint ``source`` has other P or S than this run."""
    layout = session.world.layout
    return _shape(source) != (layout.num_particles, layout.particle_size)


def _shape(source: Path) -> tuple[int, int]:
    """P and S, as any of the ranks has recorded them."""
    path = next(iter(sorted((source / "swarm").glob("rank_*.json"))), None)
    if path is None:
        raise CheckpointError(f"{source}: holds no record of any rank; resume from another step_* folder")
    record = parse_record(path)
    return int(record["num_particles"]), int(record["particle_size"])


class Reshaped:
    """What this rank restores.

    Attributes:
        record: as ``checkpoint.save`` writes it; its "random" is None where this rank had no predecessor.
        folder: of the particle that this one continues.
        begins_anew: a lone particle becomes several, which have not met before.
    """

    def __init__(self, session: Session, source: Path) -> None:
        """Reads the records, and checks the files of this rank's share.

        Raises:
            CheckpointError: missing or damaged, or does not say where parameters lie.
        """
        self._session, self._source = session, source
        layout = session.world.layout
        self._P, self._S = _shape(source)
        self._old = layout.particle % self._P
        self._records = [record_of(source, self._old * self._S + rank) for rank in range(self._S)]
        if any(record.get("shards") is None for record in self._records):
            raise CheckpointError(
                f"{source}: does not say where the parameters of its engine lie, so it cannot be brought to another "
                "number of ranks; resume on as many as it was saved with"
            )
        local_ranks = session.world.coordinator.local_ranks_on_this_node
        for record in self._records[local_ranks.index(layout.rank) :: len(local_ranks)]:
            check_files(record, source)
        self._stem = rank_stem(source, layout.rank)
        random = None
        if layout.rank < self._P * self._S:  # its random state lies with a rank of the same number
            predecessor = record_of(source, layout.rank)
            name = f"swarm/{self._stem.name}.safetensors"
            check_files({"files": {name: predecessor["files"][name]}}, source)
            random = predecessor["random"]
        self.folder = source / f"particle_{self._old}"
        self.begins_anew = self._P == 1 and session.synchronizer is not None
        self.record = self._own_record() | {"random": random}
        self._engine_part: Repartitioned | None = None

    # -- numbers ------------------------------------------------------------------------------

    def _own_record(self) -> dict[str, Any]:
        layout = self._session.world.layout
        record = self._records[layout.shard_rank % self._S]
        samplers = record["samplers"]
        if len(samplers) == len(self._session.samplers):
            pairs = zip(self._session.samplers, samplers, strict=True)
            samplers = [sampler.continued(state, self._P * self._S) for sampler, state in pairs]
        numbers = {"num_particles": layout.num_particles, "particle_size": layout.particle_size, "samplers": samplers}
        if self.begins_anew:
            return record | numbers | {"window": [0.0, 0, 0], "synchronizer": None}
        windows = [record["window"] for record in self._records]
        return record | numbers | {"window": self._window(windows), "synchronizer": self._meetings(record)}

    def _shared_out(self, numbers: Sequence[float]) -> float:
        """One number of each old rank of the particle -> this rank's, so that the sum over the particle stays."""
        layout = self._session.world.layout
        return sum(numbers[layout.shard_rank :: layout.particle_size])

    def _window(self, windows: Sequence[Sequence[Any]]) -> list[Any]:
        """See ``FitnessWindow.state``; all ranks of a particle have made the same steps."""
        totals, counts, steps = zip(*windows, strict=True)
        return [self._shared_out(totals), self._shared_out(counts), steps[0]]

    def _per_particle(self, values: Sequence[Any]) -> list[Any]:
        return [values[particle % self._P] for particle in range(self._session.num_particles)]

    def _meetings(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """See ``Synchronizer.state_dict``."""
        synchronizer = self._session.synchronizer
        if record["synchronizer"] is None or synchronizer is None:
            return None
        per_particle = synchronizer.parts.rule.memory_of_particles
        state: dict[str, Any] = dict(record["synchronizer"])
        state["last_losses"] = self._per_particle(state["last_losses"])
        state["rule_memories"] = [
            {key: self._per_particle(value) if key in per_particle else value for key, value in memory.items()}
            for memory in state["rule_memories"]
        ]
        met = [record["synchronizer"] for record in self._records]
        state["totals"] = state["totals"] | {
            "bytes_received": self._shared_out([other["totals"]["bytes_received"] for other in met])
        }
        if state["pending"]:
            state["pending"] = self._pending(state["pending"], [other["pending"] for other in met])
        return state

    def _pending(self, mine: Mapping[str, Any], of_all: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As one fragment, applied when the last one was due: fragments are cut from the shards of a rank."""
        record = {key: value for key, value in mine["record"].items() if not isinstance(value, list | dict)}
        record |= {key: self._per_particle(mine["record"][key]) for key in ("losses", "alive")}
        columns = zip(*(pending["distances"] for pending in of_all), strict=True)
        return {
            **mine,
            "cut_into": 1,
            "numbers": [0],
            "applied": 0,
            "record": record,
            "lr_factors": self._per_particle(mine["lr_factors"]) if mine["lr_factors"] else [],
            "window": self._window([pending["window"] for pending in of_all]),
            "distances": [self._shared_out(column) for column in columns],
            "arrived_s": mine["arrived_s"][-1:],
        }

    # -- tensors ------------------------------------------------------------------------------

    def read(self) -> dict[str, Tensor]:
        """The tensors that ``checkpoint.save`` would have written. Called when all ranks have checked their files.

        Raises:
            CheckpointError: another model, or an optimizer whose state cannot be divided.
        """
        with weights_only():
            saved = SavedParticle(self._source, self._old, self._records)
            synchronizer = self._session.synchronizer
            shards = find_shards(self._session.engine) if synchronizer is None else synchronizer.parts.shards
            check_same_model(saved, self._session.engine, shards)
            self._saved, self._segments = saved, shards.segments
            self._sizes = [tensor.numel() for tensor in shards.tensors]
            if saved.stage and not self._is_partitioned_alike():
                self._engine_part = Repartitioned(saved, self._session.engine, shards)
        own = saved.own[self._session.world.layout.shard_rank % self._S]
        tensors = {key: own.get_tensor(key) for key in own.keys() if key.startswith("buffer.")}  # noqa: SIM118
        if synchronizer is not None and not self.begins_anew:
            tensors |= self._kept(("rule", "wire"))
            if self.record["synchronizer"]["pending"]:
                tensors |= {f"pending.{i}": value for i, value in enumerate(self._movement(shards))}
        if self.record["random"] is not None:
            found = load_file(f"{self._stem}.safetensors")
            tensors |= {key: value for key, value in found.items() if key.startswith("random.")}
        return tensors

    def _is_partitioned_alike(self) -> bool:
        layout = self._session.world.layout
        if layout.particle_size != self._S:
            return False
        before = self._records[layout.shard_rank]["shards"]["segments"]
        return [Segment(*numbers) for numbers in before] == list(self._segments)

    def _kept(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Tensors like the shards: the state of the rule and of the wire."""
        own = self._saved.own
        one_of_each = {  # (kind, name) -> values of some rank and shard
            (key.split(".", 2)[0], key.split(".", 2)[2]): ranks.get_slice(key)
            for ranks in own
            for key in ranks.keys()  # noqa: SIM118
            if key.startswith(tuple(f"{kind}." for kind in kinds))
        }
        tensors: dict[str, Tensor] = {}
        for (kind, name), values in sorted(one_of_each.items()):

            def read(rank: int, shard: int, kind: str = kind, name: str = name) -> Any:
                return own[rank].get_slice(f"{kind}.{shard}.{name}")

            parts = self._saved.gather(self._segments, self._sizes, values[:1].dtype, read)
            tensors |= {f"{kind}.{i}.{name}": part for i, part in enumerate(parts)}
        return tensors

    def _movement(self, shards: Shards) -> list[Tensor]:
        """See ``Pending.movement``: of what has been applied, or was not on its way, nothing moves."""
        num_buffers, whole, means = len(shards.buffers()), [], []
        for own, record in zip(self._saved.own, self._records, strict=True):
            count = sum(key.startswith("pending.") for key in own.keys())  # noqa: SIM118
            movement = [own.get_tensor(f"pending.{i}") for i in range(count)]
            whole.append(self._like_shards(movement[: count - num_buffers], record))
            means.append(movement[count - num_buffers :])
        parts = self._saved.gather(self._segments, self._sizes, torch.float32, lambda rank, k: whole[rank][k])
        return [*parts, *means[self._session.world.layout.shard_rank % self._S]]

    def _like_shards(self, movement: Sequence[Tensor], record: Mapping[str, Any]) -> list[Tensor]:
        """What was saved of the fragments of a rank, each where it belongs in its shards."""
        pending = record["synchronizer"]["pending"]
        if pending["cut_into"] == 1:
            return list(movement) if pending["applied"] == 0 else [torch.zeros_like(values) for values in movement]
        segments = [Segment(*numbers) for numbers in record["shards"]["segments"]]
        sizes = [0] * (1 + max((s.shard for s in segments), default=-1))
        for s in segments:
            sizes[s.shard] = max(sizes[s.shard], s.shard_start + s.numel)
        whole = [torch.zeros(size) for size in sizes]
        names = [name for name, _ in self._session.engine.module.named_parameters()]
        fragments = cut_segments(segments, names, pending["cut_into"])
        parts = iter(movement)
        for place, number in enumerate(pending["numbers"]):
            for r in fragments[number]:
                values = next(parts)
                if place >= pending["applied"]:
                    r.of(whole).copy_(values)
        return whole

    # -- the engine ---------------------------------------------------------------------------

    def in_place_of_the_files(self) -> contextlib.AbstractContextManager[None]:
        """In the block ``engine.load_checkpoint`` of ``folder`` loads what this rank would have saved."""
        if self._session.is_leader and self._session.num_particles < self._P:
            warnings.warn(
                f"{self._source}: saved with {self._P} particles; what those from number {self._session.num_particles} "
                "on have learned since the last sync point is left behind",
                stacklevel=5,
            )
        return contextlib.nullcontext() if self._engine_part is None else self._engine_part.in_place_of_the_files()
