"""The swarm as a training script sees it: join, attach, sample, log, save, load, export, close."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Literal

from ds_pso import checkpoint
from ds_pso.config.load import ConfigSource, find_config, load_config
from ds_pso.config.schema import ALLREDUCE, SwarmConfig
from ds_pso.distributed.preemption import Preemption
from ds_pso.distributed.simulated_world import Simulation
from ds_pso.distributed.world import World
from ds_pso.elastic.launch_env import is_launched
from ds_pso.elastic.world import ElasticWorld
from ds_pso.errors import CheckpointError, ConfigError, PeerError, SwarmError
from ds_pso.export import live
from ds_pso.metrics import deepspeed_monitor
from ds_pso.sampler import SwarmSampler
from ds_pso.session import lr_schedule
from ds_pso.session.engine_hooks import AttachedSwarm
from ds_pso.sync.elastic import ElasticSynchronizer


def init(config: ConfigSource | None = None, *, run_dir: str | Path | None = None, world: World | None = None) -> Swarm:
    """Join the swarm. Call it first, before anything initialises torch.distributed.

    Args:
        config: DeepSpeed's JSON config with a ``swarm`` section, as a path or a mapping. Without it, the one that the
            command line names (``--deepspeed_config``, or ``--deepspeed`` as the HF Trainer spells it) or
            ``accelerate launch --deepspeed_config_file``.
        run_dir: folder for ``metrics.jsonl``; without it nothing is logged to disk.
        world: of an earlier swarm of this process that was not closed (``swarm.world``), to run many
            short experiments in one launch; the number of particles must be the same.

    Returns:
        The swarm. Its ``ds_config`` goes to ``deepspeed.initialize``; from now on the
        environment describes a world of one particle.

    Raises:
        ConfigError: bad config or environment; raised before any process group is built.
        PeerError: ranks that did not arrive within ``swarm.timeout_s``.
    """
    ds_config, swarm_config = load_config(find_config() if config is None else config)
    if ds_config.get("train_batch_size") == "auto":
        del ds_config["train_batch_size"]  # DeepSpeed multiplies it out, over the ranks of the particle
    lr_schedule.register()
    particles = 1 if swarm_config.sync_mode == ALLREDUCE else swarm_config.particles
    if world is None:
        world = Simulation.world(particles, swarm_config.timeout_s) or _build_world(particles, swarm_config)
    elif world.closed:
        raise ConfigError("the world that was given to ds_pso.init is closed; give it before its swarm is closed")
    elif particles not in ("node", world.layout.num_particles):
        raise ConfigError(
            f"swarm.particles = {particles}: the world that was given has {world.layout.num_particles}; "
            "use that number, or start another launch"
        )
    if world.layout.num_particles > 1:
        deepspeed_monitor.give_each_a_folder(ds_config, world.layout.particle)
    if particles == "node" and world.layout.num_particles == 1 and world.is_leader:
        warnings.warn(
            'swarm.particles = "node" on one node is one particle: plain DeepSpeed, without sync points; '
            "give a number of particles to split the node",
            stacklevel=2,
        )
    return Swarm(ds_config, swarm_config, world, world.own_folder(Path(run_dir)) if run_dir else None)


def _build_world(particles: int | Literal["node"], config: SwarmConfig) -> World:
    if config.transport == "elastic" and config.sync_mode != ALLREDUCE:
        return ElasticWorld.join(particles, config.elastic, config.timeout_s)
    if is_launched(os.environ):
        raise ConfigError(
            'ds-pso launch starts each particle as a job of its own; set swarm.transport to "elastic" and a sync_mode '
            f'other than "{ALLREDUCE}", or start with deepspeed'
        )
    return World.carve(particles, peer_backend=config.peer_backend, timeout_s=config.timeout_s)


class Swarm(AttachedSwarm):
    """P particles that train apart and meet every ``sync_interval`` optimizer steps. Made by ``ds_pso.init``.

    Usable as a context manager: leaving it in good order waits for the other ranks, and so does an error
    that all ranks raise alike; any other exception does not.

    Attributes:
        ds_config: DeepSpeed's part of the config, for ``deepspeed.initialize``; may be changed before that.
        config: the validated ``swarm`` section.
        world: the ranks of the swarm; ``world.layout`` says where this one stands.
    """

    # -- the training script's calls --------------------------------------------------------

    def sampler(
        self, dataset: Sized, *, batch_size: int | None = None, shuffle: bool = True, seed: int = 0
    ) -> SwarmSampler:
        """Sampler of this rank's part of ``dataset``, over all P x S ranks. Make one for the training data only.

        Args:
            dataset: anything with a length.
            batch_size: of the DataLoader; DeepSpeed's ``train_micro_batch_size_per_gpu`` if not given.
            shuffle: whether each epoch has an order of its own, the same on all ranks.
            seed: of that order.

        Returns:
            A sampler for an ordinary ``DataLoader``; its place in the data is part of a checkpoint.

        Raises:
            ConfigError: no batch size is known, or the data is not enough for one batch on every rank.
        """
        batch_size = batch_size or self.ds_config.get("train_micro_batch_size_per_gpu")
        if not isinstance(batch_size, int):
            raise ConfigError(
                'swarm.sampler needs batch_size, or a number as "train_micro_batch_size_per_gpu" in the config'
            )
        layout = self.world.layout
        sampler = SwarmSampler(
            dataset,
            rank=layout.rank,
            world_size=layout.world_size,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
        )
        self.samplers.append(sampler)
        if isinstance(self.synchronizer, ElasticSynchronizer):
            self.synchronizer.progress.place(sampler)
        return sampler

    @contextlib.contextmanager
    def consensus(self, which: Literal["consensus", "best"] = "consensus") -> Iterator[None]:
        """Inside the block the engine holds the model that ``export`` would write; call it on all ranks.

        For evaluation: with rules that leave the particles apart, none of them is the model. Take no
        step inside. It costs an exchange, and two copies of the shard in memory.

        Args:
            which: as for ``export``.

        Raises:
            ConfigError: ``which`` is neither of the two.
            PeerError: a rank did not come in time, or was lost.
        """
        if which not in ("consensus", "best"):
            raise ConfigError(f'swarm.consensus which = {which!r}: must be "consensus" or "best"')
        with self.synchronizer.consensus.held(which) if self.synchronizer else contextlib.nullcontext():
            yield

    def merge(self, which: Literal["consensus", "best"] = "consensus") -> None:
        """At the end of training: let every particle be the model that ``export`` would write; call it on all ranks.

        What a delayed sync point has not brought yet is dropped: see ``finish_pending``.
        """
        if which not in ("consensus", "best"):
            raise ConfigError(f'swarm.merge which = {which!r}: must be "consensus" or "best"')
        if self.synchronizer is not None:
            self.world.settle()
            self.synchronizer.pending = None
            self.synchronizer.consensus.adopt(which)

    def gather(self, value: float) -> list[float]:
        """Tell every rank a number of each particle; call it on all ranks. In an elastic swarm others' are NaN.

        Args:
            value: of this rank, such as a loss.

        Returns:
            The mean over the ranks of each particle, shape (P,), in the order of particles.
        """
        rows = self.world.particle_gather([value])
        mean = sum(row[0] for row in rows) / len(rows)
        if self.world.meets_at_sync_points_only:
            return [mean if particle == self.particle else math.nan for particle in range(self.num_particles)]
        return [row[0] for row in self.exchange.all_gather([mean])]

    def total_bytes(self) -> int:
        """Bytes that all ranks together have received at sync points; call it on all ranks."""
        return sum(self.world.gather("bytes", self.totals.bytes_received))

    def save(self, folder: str | Path, *, keep: int | None = None, background: bool = False) -> Path:
        """Write a checkpoint of the whole swarm; call it on all ranks, after ``engine.step``.

        Args:
            folder: gets ``step_<n>`` when all of it is written, and ``latest`` then names that.
            keep: remove all but this one and the ``keep - 1`` before it, once it is complete; None: keep all.
            background: return when the state is copied to main memory, and write it while training goes on. The
                next ``save``, ``load``, ``export`` or ``close`` waits for that, as ``wait_for_save`` does.

        Returns:
            The folder of this checkpoint.

        Raises:
            CheckpointError: it cannot be written, or the one before, in the background, could not; the complete
                ones stay.
            ConfigError: ``keep`` is less than 1.
        """
        return checkpoint.save(self, self.world.own_folder(Path(folder)), keep, background=background)

    def wait_for_save(self) -> None:
        """Wait until the checkpoint is complete that is written in the background, if one is; call it on all ranks.

        Raises:
            CheckpointError: it could not be written; the complete ones stay.
        """
        self.writer.wait()

    def rescue(self, folder: str | Path) -> Path | None:
        """After a PeerError: save this particle alone, in ``folder/particle_<i>``; call it on all its ranks.

        An elastic swarm continues from there: the lost particles take the state of those that were saved.

        Returns:
            The folder of the checkpoint; None if a rank of this particle is missing, or an exchange was broken off in
            the middle, so that the weights are neither the old nor the new.
        """
        if self.synchronizer is not None:
            if self.synchronizer.is_torn:
                return None
            self.synchronizer.pending = None
        try:
            self.world.shrink()
            return checkpoint.save(self, self.world.particle_folder(Path(folder)))
        except (PeerError, CheckpointError):
            return None

    def load(self, folder: str | Path, tag: str | None = None, *, reshape: bool = False) -> int:
        """Continue from a checkpoint; call it on all ranks, after ``attach`` and ``sampler``.

        Args:
            folder: what ``save`` was given.
            tag: name of a ``step_<n>`` in it. If not given, the latest; if a file of that is damaged, the one before
                 it, with a warning that says so.
            reshape: whether it may have been saved with another number of particles, or of ranks in each.
                Particle j then continues particle j modulo their number.

        Returns:
            Its optimizer step.

        Raises:
            CheckpointError: missing, damaged, or of another model or swarm; nothing was changed.
        """
        if isinstance(self.synchronizer, ElasticSynchronizer) and self.synchronizer.came_late:
            return int(self.engine.global_steps)  # the state of the others is newer
        step = checkpoint.load(self, self.world.own_folder(Path(folder)), tag, reshape=reshape)
        if isinstance(self.synchronizer, ElasticSynchronizer):
            self.synchronizer.joined = False
        return step

    def export(self, folder: str | Path, which: live.Choice = "consensus", tokenizer: Any = None) -> Path:
        """Write one model in Hugging Face format; call it on all ranks, after ``engine.step``.

        Args:
            folder: files of the same names are replaced, others stay. In an elastic swarm each particle writes its
                own model, into ``particle_<i>`` in it.
            which: the ``consensus`` of the particles that are alive, or the one with the ``best`` loss at the
                last sync point.
            tokenizer: saved beside the model, if given.

        Returns:
            The folder of the model; for a ``transformers`` model ``from_pretrained`` opens it.

        Raises:
            ConfigError: ``which`` is neither of the two, or no particle has finite weights.
        """
        self.writer.wait()
        return live.export(self, self.world.own_folder(Path(folder)), which, tokenizer)

    def should_stop(self) -> bool:
        """Whether this job was asked to end, by SIGTERM to any rank; call it on all ranks, after each ``engine.step``.

        All ranks get the same answer at the same step. Then save, leave the loop, close the swarm and exit with
        ``ds_pso.EXIT_PREEMPTED``. From the first call on SIGTERM does nothing else, until the swarm is closed.

        Raises:
            PeerError: the signal came, and a rank did not answer in time.
        """
        if self._preemption is None:
            self._preemption = Preemption(self.world, self.engine.global_steps)
        return self._preemption.due(self.engine.global_steps)

    def close(self) -> None:
        """Leave the swarm; waits for the other ranks, and gives the launcher's environment back."""
        if self.is_leader and self.synchronizer is not None and self.synchronizer.pending is not None:
            warnings.warn(
                "the swarm is closed while a delayed sync point is pending, which is lost; end training with "
                "swarm.sync(), or give its length in swarm.total_steps",
                stacklevel=2,
            )
        try:
            self.writer.wait()
        except SwarmError as error:
            self._leave(wait=error.agreed)
            raise
        self._leave(wait=True)

    def _leave(self, *, wait: bool) -> None:
        try:
            self.world.close() if wait else self.world.abandon()
        finally:  # last: until then the others may want to know at which step to stop
            if self._preemption is not None:
                self._preemption.close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if kind is None or getattr(error, "agreed", False):  # all leave; who hosts the store must be the last
            self.close()
        else:
            self._leave(wait=False)
