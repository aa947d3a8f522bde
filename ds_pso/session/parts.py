"""What a swarm consists of on one rank: the parts that training, checkpoints and export share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_pso.comm.exchange import Exchange
from ds_pso.config.schema import SwarmConfig
from ds_pso.distributed.preemption import Preemption
from ds_pso.distributed.world import World
from ds_pso.errors import SwarmError
from ds_pso.metrics.log import MetricsLog, versions
from ds_pso.sampler import SwarmSampler
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.parts import SyncTotals
from ds_pso.sync.synchronizer import Synchronizer
from ds_pso.utils.background_task import Writer


class SwarmState:
    """The parts, and what can be read off them. ``Swarm`` adds what can be done."""

    def __init__(self, ds_config: dict[str, Any], config: SwarmConfig, world: World, run_dir: Path | None) -> None:
        self.ds_config = ds_config
        self.config = config
        self.world = world
        self.run_dir = run_dir
        self.exchange = Exchange(world, config.bucket_mb, checksums=config.checksums)
        self.metrics = MetricsLog(run_dir / "metrics.jsonl" if run_dir and world.is_leader else None)
        self.window = FitnessWindow()
        self.samplers: list[SwarmSampler] = []
        self.last_sync: dict[str, Any] = {}  # what was logged of the last sync point
        self.writer = Writer()
        self._preemption: Preemption | None = None  # None: ``should_stop`` was never called
        self._engine: Any = None
        self._backwards = 0  # since the last optimizer step
        self.synchronizer: Synchronizer | None = None  # None: not attached, or only one particle

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine that was attached.

        Raises:
            SwarmError: none was.
        """
        if self._engine is None:
            raise SwarmError("the swarm has no engine yet; call swarm.attach(engine) first", agreed=True)
        return self._engine

    @property
    def num_particles(self) -> int:
        """P, the number of particles."""
        return self.world.layout.num_particles

    @property
    def particle(self) -> int:
        """The number of this rank's particle, from 0 to P - 1."""
        return self.world.layout.particle

    @property
    def is_leader(self) -> bool:
        """True on one rank of the whole swarm: the one that prints and logs."""
        return self.world.is_leader

    def describe(self) -> str:
        """One line for a log: ``2 particles x 4 ranks, pso every 8 steps``."""
        layout = self.world.layout
        ranks = f"{layout.particle_size} rank{'s' if layout.particle_size > 1 else ''}"
        if self.num_particles == 1:
            return f"1 particle x {ranks}: plain DeepSpeed"
        n, kind = self.config.sync_interval, self.config.schedule.type
        when = f"every {n} steps" if kind == "fixed" else f"every {n} steps at first, {kind} from there"
        if self.config.streaming:
            when += f", one of {self.config.fragments} fragments at a time"
        return f"{self.num_particles} particles x {ranks}, {self.config.sync_mode} {when}"

    def _start_record(self) -> dict[str, Any]:
        """What a report must know of the run; JSON values."""
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        return {
            "description": self.describe(),
            "particles": self.num_particles,
            "ranks": self.world.layout.particle_size,
            "backend": self.world.backend,
            "total_steps": self.config.training_steps(self.ds_config),
            "zero_stage": self.engine.zero_optimization_stage(),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trained),
            "swarm": self.config.resolved(),
            "versions": versions(),
        }

    @property
    def steps_to_sync(self) -> int | None:
        """Optimizer steps until the next sync point; None if the particles never meet."""
        if self.synchronizer is None:
            return None
        step = int(self.engine.global_steps)
        return self.synchronizer.schedule.next_after(step) - step

    @property
    def totals(self) -> SyncTotals:
        """What the sync points have cost this rank so far."""
        return self.synchronizer.totals if self.synchronizer else SyncTotals()

    @property
    def last_losses(self) -> tuple[float, ...]:
        """Loss of each particle at the last sync point, shape (P,); empty with one particle."""
        return self.synchronizer.assessor.losses if self.synchronizer else ()
