"""The swarm as a training script sees it: join, attach, sample, log, save, load, export, close."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ds_pso import checkpoint
from ds_pso.checkpoint.engine_calls import EngineCheckpoints, complete_checkpoints
from ds_pso.config import parallelism
from ds_pso.config.load import ConfigSource, find_config, load_config
from ds_pso.config.schema import ALLREDUCE, SwarmConfig
from ds_pso.config.swap_folders import give_each_a_swap_folder
from ds_pso.distributed import logs
from ds_pso.distributed.extension_locks import warn_of_old_locks
from ds_pso.distributed.preemption import Preemption
from ds_pso.distributed.simulated_world import Simulation
from ds_pso.distributed.transports import find_transport
from ds_pso.distributed.world import World
from ds_pso.elastic.launch_env import is_launched
from ds_pso.errors import CheckpointError, ConfigError, PeerError, SwarmError
from ds_pso.export import live
from ds_pso.metrics import deepspeed_monitor
from ds_pso.metrics.records import SyncRecord
from ds_pso.sampler import Share, SwarmSampler
from ds_pso.session import lr_schedule
from ds_pso.session.attach import (
    build_synchronizer,
    check_engine,
    check_samples,
    check_swap_folders,
    take_filled_in,
)
from ds_pso.session.callbacks import own_callbacks
from ds_pso.session.data_watch import shard_training_data
from ds_pso.session.ending import warn_at_end
from ds_pso.session.engine_hooks import EngineHooks
from ds_pso.session.expert_search import ExpertSearch, search
from ds_pso.session.pipeline_hooks import PipelineHooks, check_samplers
from ds_pso.session.session import Session
from ds_pso.shards.engine import is_pipeline
from ds_pso.sync.assessment import Probe
from ds_pso.sync.parts import SyncTotals
from ds_pso.utils.folder_lock import FolderLock, lock_folder

_PATIENCE_S = 5.0  # with a run that was killed and has not gone yet

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ds_pso.search.result import SearchResult


def init(config: ConfigSource | None = None, *, run_dir: str | Path | None = None, world: World | None = None) -> Swarm:
    """Join the swarm. Call it first, before anything initialises torch.distributed.

    Args:
        config: DeepSpeed's JSON config with a ``swarm`` section, as a path or a mapping. Without it, the one that the
            command line names (``--deepspeed_config``, or ``--deepspeed`` as the HF Trainer spells it) or
            ``accelerate launch --deepspeed_config_file``.
        run_dir: folder for ``metrics.jsonl``, which is locked until the swarm is closed; without it nothing is logged
            to disk.
        world: of an earlier swarm of this process that was not closed (``swarm.world``), to run many
            short experiments in one launch; the number of particles must be the same.

    Returns:
        The swarm. Its ``ds_config`` goes to ``deepspeed.initialize``; from now on the
        environment describes a world of one particle.

    Raises:
        ConfigError: bad config or environment; raised before any process group is built. Or another run writes into
            ``run_dir``.
        PeerError: ranks that did not arrive within ``swarm.timeout_s``.
    """
    logs.configure()
    ds_config, swarm_config = load_config(find_config() if config is None else config)
    if ds_config.get("train_batch_size") == "auto":
        del ds_config["train_batch_size"]  # DeepSpeed multiplies it out, over the ranks of the particle
    lr_schedule.register()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warn_of_old_locks()
    particles = 1 if swarm_config.sync_mode == ALLREDUCE else swarm_config.particles
    is_new = world is None
    if world is None:
        world = Simulation.world(particles, swarm_config.timeout_s) or _build_world(particles, swarm_config)
    elif world.closed:
        raise ConfigError("the world that was given to ds_pso.init is closed; give it before its swarm is closed")
    elif particles not in ("node", world.layout.num_particles):
        raise ConfigError(
            f"swarm.particles = {particles}: the world that was given has {world.layout.num_particles}; "
            "use that number, or start another launch"
        )
    try:
        parallelism.check_divides(ds_config, world.layout.particle_size)
    except ConfigError:  # raised by all ranks alike
        if is_new:
            world.close()
        raise
    logs.head_tracebacks()
    logs.set_place(world.layout.particle, world.layout.shard_rank, of_thread=world.peers.backend == "simulated")
    if swarm_config.per_particle:
        ds_config |= swarm_config.per_particle[world.layout.particle].model_dump()
    if world.layout.num_particles > 1:
        deepspeed_monitor.give_each_a_folder(ds_config, world.layout.particle)
        give_each_a_swap_folder(ds_config, world.layout.particle)
    if world.layout.num_particles == 1 and world.is_leader:
        for text in _cautions_for_one(swarm_config):
            warnings.warn(text, stacklevel=2)
    if world.layout.num_particles == 1 and swarm_config.has_sync_points(1):
        swarm_config = swarm_config.without_peers()
    folder = world.membership.folder(Path(run_dir)) if run_dir else None
    lock = _lock(world, folder, is_new=is_new)
    swarm = Swarm(ds_config, swarm_config, world, folder)
    swarm.session.lock = lock
    return swarm


def _cautions_for_one(config: SwarmConfig) -> Iterator[str]:
    """Yield what may not be meant of a config that makes one particle."""
    syncs, ignored = config.has_sync_points(1), config.keys_for_peers()
    if config.particles == "node" and config.sync_mode != ALLREDUCE:
        what = f"{config.sync_mode} without peers" if syncs else "plain DeepSpeed, without sync points"
        yield (
            f'swarm.particles = "node" on one node is one particle: {what}; give a number of particles to split the '
            "node"
        )
    if syncs and ignored:
        names = ", ".join(f"swarm.{name}" for name in ignored)
        yield f"one particle has nobody to exchange with, so these have no effect: {names}"


def _lock(world: World, folder: Path | None, *, is_new: bool) -> FolderLock | None:
    """Lock the run folder on the rank that writes there; called on all, which may not all have been given one."""
    try:
        with world.coordinator.agree("locking the run folder"):
            if folder is None or not world.is_leader:
                return None
            return lock_folder(folder, min(_PATIENCE_S, world.coordinator.timeout_s / 2))
    except SwarmError as error:
        if is_new:
            world.close() if error.agreed else world.abandon()
        raise


def _build_world(particles: int | Literal["node"], config: SwarmConfig) -> World:
    transport = "static" if config.sync_mode == ALLREDUCE else config.transport
    if transport == "static" and is_launched(os.environ):
        raise ConfigError(
            'ds-pso launch starts each particle as a job of its own; set swarm.transport to "elastic" and a sync_mode '
            f'other than "{ALLREDUCE}", or start with deepspeed'
        )
    return find_transport(transport)(particles, config)


class Swarm:
    """P particles that train apart and sync every ``sync_interval`` optimizer steps. Made by ``ds_pso.init``.

    Usable as a context manager: leaving it in good order waits for the other ranks, and so does an error
    that all ranks raise alike; any other exception does not.

    Attributes:
        session: the parts of the swarm on this rank.
    """

    def __init__(self, ds_config: dict[str, Any], config: SwarmConfig, world: World, run_dir: Path | None) -> None:
        self.session = Session.of(ds_config, config, world, run_dir)
        self._hooks: EngineHooks | PipelineHooks | None = None
        self._preemption: Preemption | None = None  # None: ``should_stop`` was never called
        self._last_words = weakref.finalize(self, warn_at_end, self.session)  # also if nobody closes it

    # -- what can be read -------------------------------------------------------------------

    @property
    def ds_config(self) -> dict[str, Any]:
        """DeepSpeed's part of the config, for ``deepspeed.initialize``; may be changed before that."""
        return self.session.ds_config

    @property
    def config(self) -> SwarmConfig:
        """The validated ``swarm`` section; where one particle syncs, with the defaults for what it does not use."""
        return self.session.config

    @config.setter
    def config(self, config: SwarmConfig) -> None:
        self.session.config = config

    @property
    def world(self) -> World:
        """The ranks of the swarm; ``world.layout`` says where this one stands."""
        return self.session.world

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine that was attached.

        Raises:
            SwarmError: none was.
        """
        return self.session.engine

    @property
    def num_particles(self) -> int:
        """P, the number of particles."""
        return self.session.num_particles

    @property
    def has_sync_points(self) -> bool:
        """True if the rule acts every few steps; false for plain DeepSpeed: one particle, by most rules."""
        return self.session.has_sync_points

    @property
    def particle(self) -> int:
        """The number of this rank's particle, from 0 to P - 1."""
        return self.session.particle

    @property
    def ranks_per_sample(self) -> int:
        """The number of ranks of a particle that compute on the same samples together.

        1, but under sequence or tensor parallelism: ``swarm.sampler`` gives these ranks the same samples.
        """
        return self.session.ranks_per_sample

    @property
    def is_leader(self) -> bool:
        """True on one rank of the whole swarm: the one that prints and logs."""
        return self.world.is_leader

    @property
    def last_sync(self) -> SyncRecord | None:
        """The record of the last sync; None: there was none."""
        return self.session.last_sync

    @property
    def steps_to_sync(self) -> int | None:
        """Optimizer steps until the next sync point; None if there is none."""
        if self.session.synchronizer is None or self.config.never_syncs:
            return None
        step = self.session.step
        return self.session.synchronizer.parts.schedule.next_after(step) - step

    @property
    def totals(self) -> SyncTotals:
        """The cost of all syncs so far, for this rank."""
        synchronizer = self.session.synchronizer
        return synchronizer.parts.totals if synchronizer else SyncTotals()

    @property
    def last_losses(self) -> tuple[float, ...]:
        """Loss of each particle at the last sync, shape (P,); empty without sync points."""
        synchronizer = self.session.synchronizer
        return tuple(synchronizer.parts.assessor.losses) if synchronizer else ()

    def describe(self) -> str:
        """Describe the swarm in one line for a log: ``2 particles x 4 ranks, local_sgd every 8 steps``."""
        return self.session.describe()

    # -- the training script's calls --------------------------------------------------------

    def attach(self, engine: Any, probe: Probe | None = None) -> Any:
        """Let ``engine.step()`` sync with the other particles at sync points, or act alone if there are no others.

        Of a pipeline engine, which has no such call, ``engine.train_batch()``.

        Copies the weights of particle 0 to all others, so that all start alike.

        Args:
            engine: what ``deepspeed.initialize`` returned, with an optimizer.
            probe: for ``"fitness": "probe"`` and for rules that score what they try: a function of the
                number of the sync point, for choosing a batch, that returns the engine's loss on it.
                The batch must be the same for every particle. Called on all ranks, without gradients;
                the mean over a particle's ranks counts.

        Returns:
            The same engine.

        Raises:
            UnsupportedError: the engine uses a feature that the swarm cannot follow.
            ConfigError: the config asks for a probe and none is given, or for the length of the training.
            SwarmError: the particles hold different models, attach was called before, or this is no engine.
        """
        session = self.session
        if self._hooks is not None:
            raise SwarmError("swarm.attach was called twice; one swarm trains one engine", agreed=True)
        check_engine(engine)
        check_samplers(session, engine)
        take_filled_in(session, engine.config)
        check_samples(session, engine)
        check_swap_folders(session, engine)
        synchronizer = build_synchronizer(session, engine, probe)
        if synchronizer is not None:
            synchronizer.start(session.window, engine.global_steps)
        session.synchronizer, session.attached_engine = synchronizer, engine
        shard_training_data(session, engine, self.sampler)
        session.callbacks[:0] = own_callbacks(session)
        self._hooks = PipelineHooks(session, engine) if is_pipeline(engine) else EngineHooks(session, engine)
        complete_checkpoints(engine)
        if synchronizer is not None:
            EngineCheckpoints(session, engine)
        session.uploads.known = int(engine.global_steps)  # of others, for a particle that joins them
        if self.world.membership.has_newer_state:
            session.metrics.rewind(engine.global_steps)
        session.log("start", **session.start_record())
        return engine

    def prepare(
        self,
        accelerator: Accelerator,
        *objects: object,
        probe: Probe | None = None,
        schedule: Literal["epochs", "steps"] = "epochs",
    ) -> tuple[Any, ...]:
        """Do under Hugging Face Accelerate what ``accelerator.prepare`` does, and attach; call it on all ranks.

        The training loader, which is the only one or the only one that shuffles, is sharded over all P x S ranks, and
        its place is part of a checkpoint. Evaluation loaders are sharded inside the particle, here or by
        ``accelerator.prepare``. ``accelerator.save_state`` and ``load_state`` write and read a folder for each
        particle in theirs.

        Args:
            accelerator: made after ``ds_pso.init``, under DeepSpeed.
            objects: model and optimizer, and if there are any scheduler and loaders, none of them prepared before.
            probe: as for ``attach``.
            schedule: what the length of the scheduler was computed from: ``"epochs"`` x ``len(loader)`` before it was
                prepared, as under Accelerate on P x S ranks; or optimizer ``"steps"`` x ``accelerator.num_processes``,
                as under Accelerate on the S ranks of a particle.

        Returns:
            The prepared objects, in the order of ``objects``.

        Raises:
            ConfigError: something is missing, of another kind or ambiguous; or as by ``attach``.
            UnsupportedError: a sampler of its own for the training data; or as by ``attach``.
        """
        from ds_pso.accelerate import prepare  # only such scripts import Accelerate

        return prepare(self, accelerator, objects, probe, schedule)

    def sync(self) -> None:
        """Sync now, with the other particles if there are any; call it on all ranks, outside of forward and backward.

        ``engine.step`` does it when a sync point is due. This one counts as one more.

        Raises:
            PeerError: a rank did not come in time, or was lost.
        """
        session = self.session
        if session.synchronizer is not None:
            self.finish_pending()
            record = session.synchronizer.sync(session.window, session.step)
            assert record is not None, "the swarm has started"
            session.sync_has_ended(record)

    def finish_pending(self) -> None:
        """Apply now what a delayed sync still has to bring, if one is pending; call it on all ranks."""
        session = self.session
        if session.synchronizer is not None:
            record = session.synchronizer.finish_pending(session.window, session.step)
            if record is not None:
                session.sync_has_ended(record)

    def on_sync(self, callback: Callable[[SyncRecord], None]) -> None:
        """Call ``callback`` on this rank with the record of each sync that has ended, at its end.

        Metrics and monitors are written in the same way. What the callback raises, the call raises that has synced.
        """
        self.session.callbacks.append(callback)

    def log(self, event: str, **values: Any) -> None:
        """Append a record to ``metrics.jsonl`` (the leader's; other ranks' are dropped).

        Args:
            event: what kind of record; ds_pso's own are ``start`` and ``sync``.
            values: what JSON can hold; NaN and infinities become null.
        """
        self.session.log(event, **values)

    def sampler(
        self, dataset: Sized, *, batch_size: int | None = None, shuffle: bool = True, seed: int = 0
    ) -> SwarmSampler:
        """Sampler of this rank's part of ``dataset``, over all P x S ranks. Make one for the training data only.

        Ranks that compute on the same samples together get the same part: those of a sequence, if the config has
        ``sequence_parallel_size``, and those of a layer, if it has ``tensor_parallel.autotp_size``. The stages of
        a pipeline do so, too, if the sampler is made after ``attach``.

        Args:
            dataset: anything with a length.
            batch_size: of the DataLoader; DeepSpeed's ``train_micro_batch_size_per_gpu`` if not given. With
                ``swarm.per_particle`` it is that of this particle, and samples are shared out in proportion.
            shuffle: whether each epoch has an order of its own, the same on all ranks.
            seed: of that order.

        Returns:
            A sampler for an ordinary ``DataLoader``; its place in the data is part of a checkpoint.

        Raises:
            ConfigError: no batch size is known, or it is not that of ``per_particle``, or the data is not enough for
                one batch on every rank.
        """
        batch_size = batch_size or self.ds_config.get("train_micro_batch_size_per_gpu")
        if not isinstance(batch_size, int):
            raise ConfigError(
                'swarm.sampler needs batch_size, or a number as "train_micro_batch_size_per_gpu" in the config'
            )
        session, layout, entries, share = self.session, self.world.layout, self.config.per_particle, None
        if entries:
            mine = entries[layout.particle].train_micro_batch_size_per_gpu
            if batch_size != mine:
                raise ConfigError(
                    f"swarm.sampler batch_size = {batch_size}: swarm.per_particle says {mine} for particle "
                    f'{layout.particle}; give it swarm.ds_config["train_micro_batch_size_per_gpu"], or leave it out'
                )
            parts = layout.particle_size // session.ranks_per_sample
            share = Share.of([entry.samples_of_a_rank for entry in entries], parts, session.data_rank)
        sampler = SwarmSampler(
            dataset,
            rank=session.data_rank,
            world_size=session.num_data_ranks,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            share=share,
        )
        session.samplers.append(sampler)
        if session.synchronizer is not None:
            session.synchronizer.recovery.progress.place(sampler)
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
        synchronizer = self.session.synchronizer
        with synchronizer.consensus.held(which) if synchronizer else contextlib.nullcontext():
            yield

    def merge(self, which: Literal["consensus", "best"] = "consensus") -> None:
        """At the end of training: let every particle be the model that ``export`` would write; call it on all ranks.

        What a delayed sync point has not brought yet is dropped: see ``finish_pending``.
        """
        if which not in ("consensus", "best"):
            raise ConfigError(f'swarm.merge which = {which!r}: must be "consensus" or "best"')
        synchronizer = self.session.synchronizer
        if synchronizer is not None:
            self.world.background.settle()
            synchronizer.overlap.pending = None
            synchronizer.consensus.adopt(which)
            self.session.is_merged = True

    def search(
        self,
        score: Callable[[], float],
        *,
        test: Callable[[], float] | None = None,
        searcher: str = "pso",
        options: Mapping[str, object] | None = None,
        blocks: Literal["layers", "tensors", "one"] = "layers",
        evaluations: int = 200,
        seed: int = 0,
        higher_is_better: bool = False,
        noisy_score: bool = False,
        resume: bool = False,
    ) -> SearchResult:
        """Take the particles for experts, and search the combination of their weights that scores best.

        Call it on all ranks. Afterwards every particle is that model, as after ``merge``. Each evaluation moves one
        all-reduce of the shard; beside the shard, each rank keeps a copy of its own. Only what is trained is combined,
        so of a model with adapters the adapters alone; of buffers all take the mean.

        Args:
            score: of the engine as it is, in evaluation mode and without gradients: a loss, or any number. Called on
                all ranks, and the mean of what they return counts, so let each take its part of the samples
                (``swarm.world.layout.rank`` of ``world_size``, both divided by ``swarm.ranks_per_sample``, without a
                rest), the same ones each time.
            test: likewise, on other samples; scores the result once, the best expert and the mean of all.
            searcher: see docs/experts.md; those that need a base are for ``ds-pso search``.
            options: of the searcher.
            blocks: what has a coefficient of its own.
            evaluations: calls of ``score``, at most.
            seed: of all random numbers.
            higher_is_better: whether ``score`` is to be as high as possible; else as low.
            noisy_score: whether the score of one model may vary.
            resume: go on with ``search.json`` in the run folder, after ``swarm.load`` has brought back the experts.

        Returns:
            Scores of the result, of the best expert and of the mean, and the coefficients. With a ``run_dir`` the
            record is in ``search.json`` there.

        Raises:
            ConfigError: a setting is wrong; or scores of one model differ, or none is finite.
            CheckpointError: the record cannot be resumed.
            SwarmError: ``score`` has failed on a rank, or a particle's weights are not finite.
        """
        self.finish_pending()
        settings = ExpertSearch(
            score, test, searcher, options or {}, blocks, evaluations, seed, higher_is_better, noisy_score, resume
        )
        return search(self.session, settings)

    def gather(self, value: float) -> list[float]:
        """Return a number of each particle, on every rank; call it on all ranks. In an elastic swarm others' are NaN.

        Args:
            value: of this rank, such as a loss.

        Returns:
            The mean over the ranks of each particle, shape (P,), in the order of particles.
        """
        rows = self.world.local.gather([value])
        mean = sum(row[0] for row in rows) / len(rows)
        if len(self.world.membership.reachable()) == 1:
            return [mean if particle == self.particle else math.nan for particle in range(self.num_particles)]
        return [row[0] for row in self.session.exchange.all_gather([mean])]

    def total_bytes(self) -> int:
        """Return the bytes that all ranks together have received in syncs; call it on all ranks."""
        return sum(self.world.coordinator.gather("bytes", self.totals.bytes_received))

    def save(self, folder: str | Path, *, keep: int | None = None, background: bool = False) -> Path:
        """Write a checkpoint of the whole swarm; call it on all ranks, after ``engine.step``.

        Args:
            folder: gets ``step_<n>`` when all of it is written, and ``latest`` then names that. It is then copied to
                ``swarm.remote_checkpoints``, if that is set, while training goes on; if that fails, there is a warning.
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
        return checkpoint.save(self.session, self.world.membership.folder(Path(folder)), keep, background=background)

    def wait_for_save(self) -> None:
        """Wait until the checkpoint is complete that is written in the background, if one is; call it on all ranks.

        Raises:
            CheckpointError: it could not be written; the complete ones stay.
        """
        self.session.writer.wait()

    def rescue(self, folder: str | Path) -> Path | None:
        """After a PeerError: save this particle alone, in ``folder/particle_<i>``; call it on all its ranks.

        An elastic swarm continues from there: the lost particles take the state of those that were saved.

        Returns:
            The folder of the checkpoint; None if a rank of this particle is missing, or an exchange was broken off in
            the middle, so that the weights are neither the old nor the new.
        """
        synchronizer = self.session.synchronizer
        if synchronizer is not None:
            if synchronizer.parts.is_torn:
                return None
            synchronizer.overlap.pending = None
        try:
            self.world.confine()
            return checkpoint.save(self.session, self.world.layout.particle_folder(Path(folder)), upload=False)
        except (PeerError, CheckpointError):
            return None

    def load(self, folder: str | Path, tag: str | None = None, *, reshape: bool = False) -> int:
        """Continue from a checkpoint; call it on all ranks, after ``attach`` and ``sampler``.

        Args:
            folder: what ``save`` was given.
            tag: name of a ``step_<n>`` in it. If not given, the latest; if a file of that is damaged, the one before
                 it, with a warning that says so. A newer one, or the one that is named, is fetched first from
                 ``swarm.remote_checkpoints``.
            reshape: whether it may have been saved with another number of particles, or of ranks in each.
                Particle j then continues particle j modulo their number.

        Returns:
            Its optimizer step.

        Raises:
            CheckpointError: missing, damaged, or of another model or swarm; nothing was changed.
            ConfigError: ``reshape`` in an elastic swarm.
        """
        membership = self.world.membership
        if reshape and membership.can_fail:
            raise ConfigError(
                "reshape = true: in an elastic swarm each particle reads its own checkpoint alone; leave reshape "
                "(train.py: --reshape) out, and start as many places and ranks per particle as were saved"
            )
        if membership.has_newer_state:
            return int(self.engine.global_steps)
        step = checkpoint.load(self.session, membership.folder(Path(folder)), tag, reshape=reshape)
        membership.reloaded()
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
        self.session.writer.wait()
        return live.export(self.session, self.world.membership.folder(Path(folder)), which, tokenizer)

    def should_stop(self) -> bool:
        """Return whether a signal to any rank asked this job to end; call it on all ranks, after each ``engine.step``.

        All ranks get the same answer at the same step. Then save, leave the loop, close the swarm and exit with
        ``ds_pso.EXIT_PREEMPTED``. From the first call on SIGTERM, SIGINT (Ctrl-C) and SIGHUP do nothing else, until the
        swarm is closed; but a second Ctrl-C ends the process at once.

        Raises:
            PeerError: the signal came, and a rank did not answer in time.
        """
        if self._preemption is None:
            self._preemption = Preemption(self.world.coordinator, self.engine.global_steps)
        return self._preemption.due(self.engine.global_steps)

    def close(self) -> None:
        """Leave the swarm; waits for the other ranks, and gives the launcher's environment back.

        Waits for the upload of the last checkpoint, too, for ``swarm.timeout_s`` at most.
        """
        self._last_words()
        try:
            self.session.writer.wait()
            checkpoint.finish_uploads(self.session)
        except SwarmError as error:
            self._leave(wait=error.agreed)
            raise
        self._leave(wait=True)

    def _leave(self, *, wait: bool) -> None:
        self._last_words.detach()
        try:
            self.world.close(self.session.step) if wait else self.world.abandon()
        finally:  # last: until then the others may want to know at which step to stop
            if self._preemption is not None:
                self._preemption.close()
            self.session.unlock()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if kind is None or getattr(error, "agreed", False):  # all leave; who hosts the store must be the last
            self.close()
        else:
            self._leave(wait=False)
