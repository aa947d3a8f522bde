"""A swarm on one rank: the parts that training, checkpoints and export share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_pso.comm.compression import UNCOMPRESSED
from ds_pso.comm.exchange import Exchange
from ds_pso.config import parallelism
from ds_pso.config.schema import SwarmConfig
from ds_pso.distributed.world import World
from ds_pso.errors import SwarmError
from ds_pso.metrics.log import MetricsLog, versions
from ds_pso.metrics.records import SyncRecord
from ds_pso.sampler import SwarmSampler
from ds_pso.session.uploads import Uploads
from ds_pso.shards.engine import is_pipeline, num_stages, ranks_per_sample, tensor_parallel_size
from ds_pso.shards.experts import whole_parameters
from ds_pso.shards.tensor_parallel import is_split
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.synchronizer import Synchronizer
from ds_pso.utils.background_task import Writer
from ds_pso.utils.folder_lock import FolderLock


@dataclass
class Session:
    """The parts, and what can be read off them. ``Swarm`` adds what can be done.

    Attributes:
        ds_config: DeepSpeed's part of the config.
        config: the validated ``swarm`` section.
        run_dir: folder for ``metrics.jsonl``; None: nothing is logged to disk.
        window: losses since the last sync.
        callbacks: called with the record of each sync, in order.
        last_sync: its record; None: there was none.
        writer: the checkpoint that is being written in the background.
        uploads: its copies at ``swarm.remote_checkpoints``.
        synchronizer: None: not attached, or there are no sync points.
        is_merged: whether ``Swarm.merge`` has made the particles one.
        loads_engine: whether ds_pso itself is calling ``engine.load_checkpoint``, with a folder that it has chosen.
        has_trainer: whether a Trainer or Accelerate saves and loads the engine, and the swarm's part is added to that.
        lock: of ``run_dir``, on the rank that writes there.
    """

    ds_config: dict[str, Any]
    config: SwarmConfig
    world: World
    run_dir: Path | None
    exchange: Exchange
    metrics: MetricsLog
    window: FitnessWindow = field(default_factory=FitnessWindow)
    samplers: list[SwarmSampler] = field(default_factory=list)
    callbacks: list[Callable[[SyncRecord], None]] = field(default_factory=list)
    last_sync: SyncRecord | None = None
    writer: Writer = field(default_factory=Writer)
    uploads: Uploads = field(default_factory=Uploads)
    synchronizer: Synchronizer | None = None
    attached_engine: Any = None
    is_merged: bool = False
    loads_engine: bool = False
    has_trainer: bool = False
    lock: FolderLock | None = None

    @classmethod
    def of(cls, ds_config: dict[str, Any], config: SwarmConfig, world: World, run_dir: Path | None) -> Session:
        """Make the parts that do not need an engine."""
        path = run_dir / "metrics.jsonl" if run_dir and world.is_leader else None
        exchange = Exchange(world, config.bucket_mb, checksums=config.checksums)
        return cls(ds_config, config, world, run_dir, exchange, MetricsLog(path))

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine that was attached.

        Raises:
            SwarmError: none was.
        """
        if self.attached_engine is None:
            raise SwarmError("the swarm has no engine yet; call swarm.attach(engine) first", agreed=True)
        return self.attached_engine

    @property
    def num_particles(self) -> int:
        """P, the number of particles."""
        return self.world.layout.num_particles

    @property
    def has_sync_points(self) -> bool:
        """True if the rule acts every few steps; false for plain DeepSpeed. Known before an engine is attached."""
        return self.config.has_sync_points(self.num_particles)

    @property
    def particle(self) -> int:
        """The number of this rank's particle."""
        return self.world.layout.particle

    @property
    def ranks_per_sample(self) -> int:
        """The number of ranks of a particle that compute on the same samples together: more than 1 under sequence,
        tensor and pipeline parallelism. Of the engine, or before there is one of the config.
        """
        if self.attached_engine is None:
            return parallelism.ranks_per_sample(self.ds_config)
        return ranks_per_sample(self.attached_engine)

    @property
    def data_rank(self) -> int:
        """The number of the part of the data that this rank trains on, of ``num_data_ranks``."""
        layout, engine = self.world.layout, self.attached_engine
        if engine is not None and is_pipeline(engine):  # whose stages are not neighbours
            return layout.particle * int(engine.dp_world_size) + int(engine.mpu.get_data_parallel_rank())
        return layout.rank // self.ranks_per_sample

    @property
    def num_data_ranks(self) -> int:
        """The number of parts into which the data are divided, over all particles."""
        return self.world.layout.world_size // self.ranks_per_sample

    @property
    def is_leader(self) -> bool:
        """True on the rank that prints and logs."""
        return self.world.is_leader

    @property
    def step(self) -> int:
        """Optimizer steps so far; 0 without an engine."""
        return int(self.attached_engine.global_steps) if self.attached_engine else 0

    def unlock(self) -> None:
        """Let another run have ``run_dir``."""
        lock, self.lock = self.lock, None
        if lock is not None:
            lock.release()

    def log(self, event: str, **values: Any) -> None:
        """Append a record to ``metrics.jsonl`` (the leader's; other ranks' are dropped)."""
        self.metrics.write(event, self.step, values)

    def step_has_ended(self) -> None:
        """Count an optimizer step, and sync if it is due. Called alike on all ranks."""
        self.window.steps += 1
        if self.synchronizer is not None:
            self.synchronizer.after_step(self.window, self.step, self.sync_has_ended)

    def sync_has_ended(self, record: SyncRecord) -> None:
        """Remember the record, and call the callbacks."""
        self.last_sync = record
        for callback in self.callbacks:
            callback(record)

    def describe(self) -> str:
        """Describe the swarm in one line: ``2 particles x 4 ranks, local_sgd every 8 steps in int4, 2 steps late``."""
        layout = self.world.layout
        ranks = f"{layout.particle_size} rank{'s' if layout.particle_size > 1 else ''}"
        particles = f"{self.num_particles} particle{'s' if self.num_particles > 1 else ''}"
        if not self.has_sync_points:
            return f"{particles} x {ranks}: plain DeepSpeed"
        if self.config.never_syncs:
            return f"{particles} x {ranks}, without sync points of their own"
        n, kind = self.config.sync_interval, self.config.schedule.type
        when = f"every {n} steps" if kind == "fixed" else f"every {n} steps at first, {kind} from there"
        if self.config.streaming:
            when += f", one of {self.config.fragments} fragments at a time"
        if self.config.wire != UNCOMPRESSED:
            when += f" in {self.config.wire}"
        if self.config.delay:
            when += f", {self.config.delay} step{'s' if self.config.delay > 1 else ''} late"
        return f"{particles} x {ranks}, {self.config.sync_mode} {when}"

    def start_record(self) -> dict[str, Any]:
        """Return what a report must know of the run; JSON values. Called on all ranks."""
        return {
            "description": self.describe(),
            "particles": self.num_particles,
            "ranks": self.world.layout.particle_size,
            "backend": self.world.peers.backend,
            "sync_points": self.has_sync_points,
            "total_steps": self.config.training_steps(self.ds_config),
            "zero_stage": self.engine.zero_optimization_stage(),
            "parameters": self._num_trained(),
            "swarm": self.config.resolved(),
            "versions": versions(),
        }

    def _num_trained(self) -> int:
        """Count the elements of all trained parameters of the model; called on all ranks."""
        engine = self.engine
        trained = [p.like for p in whole_parameters(engine.module) if p.like.requires_grad]
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in trained if not is_split(p))
        parts = sum(getattr(p, "ds_numel", p.numel()) for p in trained if is_split(p))
        rows = self.world.local.gather([float(whole), float(parts)])
        if num_stages(engine) > 1:  # of which each stage has some
            return round(sum(row[0] for row in rows) * num_stages(engine) / len(rows))
        return int(whole + sum(row[1] for row in rows[: tensor_parallel_size(engine)]))  # the ranks of one group
