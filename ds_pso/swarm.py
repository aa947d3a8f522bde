"""The swarm as a training script sees it: join, attach, sample, log, save, load, export, close."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ds_pso import checkpoint, export, lr_schedule, monitor
from ds_pso.census import Probe
from ds_pso.config import ALLREDUCE, ConfigSource, find_config, load_config
from ds_pso.consistency import total_num_steps
from ds_pso.errors import ConfigError, SwarmError
from ds_pso.keeping import Keeping
from ds_pso.sampler import SwarmSampler
from ds_pso.shards import find_shards
from ds_pso.simulated_world import Crew
from ds_pso.state import SwarmState
from ds_pso.synchronizer import Synchronizer
from ds_pso.world import World


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
        world = Crew.world(particles, swarm_config.timeout_s) or World.carve(
            particles, peer_backend=swarm_config.peer_backend, timeout_s=swarm_config.timeout_s
        )
    elif world.closed:
        raise ConfigError("the world that was given to ds_pso.init is closed; give it before its swarm is closed")
    elif particles not in ("node", world.layout.num_particles):
        raise ConfigError(
            f"swarm.particles = {particles}: the world that was given has {world.layout.num_particles}; "
            "use that number, or start another launch"
        )
    if world.layout.num_particles > 1:
        monitor.give_each_a_folder(ds_config, world.layout.particle)
    if particles == "node" and world.layout.num_particles == 1 and world.is_leader:
        warnings.warn(
            'swarm.particles = "node" on one node is one particle: plain DeepSpeed, without sync points; '
            "give a number of particles to split the node",
            stacklevel=2,
        )
    return Swarm(ds_config, swarm_config, world, Path(run_dir) if run_dir else None)


class Swarm(SwarmState):
    """P particles that train apart and meet every ``sync_interval`` optimizer steps. Made by ``ds_pso.init``.

    Usable as a context manager: leaving it in good order waits for the other ranks, and so does an error
    that all ranks raise alike; any other exception does not.

    Attributes:
        ds_config: DeepSpeed's part of the config, for ``deepspeed.initialize``; may be changed before that.
        config: the validated ``swarm`` section.
        world: the ranks of the swarm; ``world.layout`` says where this one stands.
    """

    # -- the training script's calls --------------------------------------------------------

    def attach(self, engine: Any, probe: Probe | None = None) -> Any:
        """Let ``engine.step()`` meet the swarm at sync points.

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
            SwarmError: the particles hold different models, or attach was called before.
        """
        if self._engine is not None:
            raise SwarmError("swarm.attach was called twice; one swarm trains one engine", agreed=True)
        self._take_filled_in(engine.config)
        rule = self.config.build_rule()
        if rule is not None and self.num_particles > 1:
            if self.config.fitness == "probe" and probe is None:
                raise ConfigError('swarm.fitness = "probe": give swarm.attach a probe, or use "train"')
            if rule.uses_probe and probe is None:
                raise ConfigError(
                    f'swarm.sync_mode = "{self.config.sync_mode}": it scores weights on a probe batch; '
                    "give swarm.attach a probe, or choose another mode or options"
                )
            schedule = self.config.build_schedule(self.ds_config)
            if schedule.last == 0 and self.is_leader:
                warnings.warn(
                    f"swarm.sync_interval = {self.config.sync_interval}: longer than the whole training, so that the "
                    "particles never meet; lower it",
                    stacklevel=2,
                )
            if rule.uses_progress and not schedule.last:
                raise ConfigError(
                    f"swarm.{self.config.sync_mode} changes over training, and scheduler.params.total_num_steps = "
                    f"{total_num_steps(self.ds_config)!r} gives no sync point; give a number of at least "
                    "swarm.sync_interval there or in swarm.total_steps"
                )
            with self.world.agree("attaching the engine"):
                shards = find_shards(engine)
            self.synchronizer = Synchronizer(
                self.world,
                self.exchange,
                rule,
                shards,
                probe=probe,
                rank_by=self.config.fitness,
                schedule=schedule,
                optimizer_state=self.config.optimizer_state,
                wire=self.config.wire,
                fragments=self.config.fragments,
                streaming=self.config.streaming,
                keeping=Keeping(self.config.state_device, self.config.state_dtype),
            )
        self._engine = engine
        self._follow(engine)
        self.log("start", **self._start_record())
        return engine

    def _take_filled_in(self, config: Any) -> None:
        """Accelerate and the HF Trainer replace each "auto" in a copy, or in what they have read themselves."""
        if not isinstance(config, Mapping):
            return  # a path
        for name in monitor.OWN_FOLDERS if self.num_particles > 1 else ():
            section = config.get(name) or {}
            if section.get("enabled") and f"particle_{self.particle}" not in str(section):
                raise ConfigError(
                    f"{name}: the particles would write into one another's files; give DeepSpeed swarm.ds_config, in "
                    "which each has a folder of its own, and not the file itself"
                )
        self.ds_config = {key: value for key, value in config.items() if key != "swarm"}

    def sync(self) -> None:
        """Meet the other particles now; call it on all ranks, outside of forward and backward.

        ``engine.step`` does it when a sync point is due. This one counts as one more.

        Raises:
            PeerError: a rank did not come in time, or was lost.
        """
        if self.synchronizer is not None:
            self._advance(to_the_end=True)
            self._log_sync(self.synchronizer.sync(self.window, self.engine.global_steps))

    def finish_pending(self) -> None:
        """Apply now what a delayed sync point still has to bring, if one is pending; call it on all ranks."""
        self._advance(to_the_end=True)

    def _advance(self, *, to_the_end: bool = False) -> None:
        """Apply what a delayed sync point has brought, so far as it is due."""
        if self.synchronizer is not None and self.synchronizer.pending is not None:
            record = self.synchronizer.advance(self.window, self.engine.global_steps, to_the_end=to_the_end)
            if record is not None:
                self._log_sync(record)

    def _log_sync(self, record: dict[str, Any]) -> None:
        self.last_sync = record
        self.log("sync", **record)
        if self.is_leader and self.engine.monitor.enabled:
            self.engine.monitor.write_events(monitor.events(record, self.engine.global_samples))

    def _meet_if_due(self, step: int) -> None:
        synchronizer = self.synchronizer
        if synchronizer is None:
            return
        synchronizer.clock.tick()
        self._advance()
        schedule = synchronizer.schedule
        if synchronizer.needs_whole or schedule.is_due(step):
            # After resuming with a shorter interval it may begin before the last one is due.
            self._advance(to_the_end=True)
            waits = self.config.delay == 0 or schedule.in_warmup(step) or schedule.progress(step) == 1
            if waits or synchronizer.needs_whole:
                self.sync()
            else:
                synchronizer.begin(self.window, step, self.config.delay)
        synchronizer.clock.go_on()

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
        """Tell every rank a number of each particle; call it on all ranks.

        Args:
            value: of this rank, such as a loss.

        Returns:
            The mean over the ranks of each particle, shape (P,), in the order of particles.
        """
        rows = self.world.particle_gather([value])
        mean = sum(row[0] for row in rows) / len(rows)
        return [row[0] for row in self.exchange.all_gather([mean])]

    def total_bytes(self) -> int:
        """Bytes that all ranks together have received at sync points; call it on all ranks."""
        return sum(self.world.gather("bytes", self.totals.bytes_received))

    def log(self, event: str, **values: Any) -> None:
        """Append a record to ``metrics.jsonl`` (the leader's; other ranks' are dropped).

        Args:
            event: what kind of record; ds_pso's own are called ``sync``.
            values: what JSON can hold; NaN and infinities become null.
        """
        self.metrics.write(event, self._engine.global_steps if self._engine else 0, values)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint of the whole swarm; call it on all ranks, after ``engine.step``.

        Args:
            folder: gets ``step_<n>`` when all of it is written, and ``latest`` then names that.

        Returns:
            The folder of this checkpoint.

        Raises:
            CheckpointError: it cannot be written; the complete ones stay.
        """
        return checkpoint.save(self, Path(folder))

    def load(self, folder: str | Path, tag: str | None = None) -> int:
        """Continue from a checkpoint; call it on all ranks, after ``attach`` and ``sampler``.

        Args:
            folder: what ``save`` was given.
            tag: name of a ``step_<n>`` in it; the latest one if not given.

        Returns:
            Its optimizer step.

        Raises:
            CheckpointError: missing, damaged, or of another model or swarm; nothing was changed.
        """
        return checkpoint.load(self, Path(folder), tag)

    def export(self, folder: str | Path, which: export.Choice = "consensus", tokenizer: Any = None) -> Path:
        """Write one model in Hugging Face format; call it on all ranks, after ``engine.step``.

        Args:
            folder: files of the same names are replaced, others stay.
            which: the ``consensus`` of the particles that are alive, or the one with the ``best`` loss at the
                last sync point.
            tokenizer: saved beside the model, if given.

        Returns:
            The folder; for a ``transformers`` model ``from_pretrained`` opens it.

        Raises:
            ConfigError: ``which`` is neither of the two, or no particle has finite weights.
        """
        return export.export(self, Path(folder), which, tokenizer)

    def close(self) -> None:
        """Leave the swarm; waits for the other ranks, and gives the launcher's environment back."""
        if self.is_leader and self.synchronizer is not None and self.synchronizer.pending is not None:
            warnings.warn(
                "the swarm is closed while a delayed sync point is pending, which is lost; end training with "
                "swarm.sync(), or give its length in swarm.total_steps",
                stacklevel=2,
            )
        self.world.close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if kind is None or getattr(error, "agreed", False):  # all leave; who hosts the store must be the last
            self.close()
        else:
            self.world.abandon()

    # -- following the engine ---------------------------------------------------------------

    def _follow(self, engine: Any) -> None:
        """Watch the engine from outside: on overflow its optimizer is not even called."""
        backward, step = engine.backward, engine.step

        def backward_and_record(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = backward(loss, *args, **kwargs)
            # The HF Trainer divides by the accumulation steps itself, and says so.
            divided = kwargs.get("scale_wrt_gas") is False
            self.window.add(loss * engine.gradient_accumulation_steps() if divided else loss)
            self._backwards += 1
            for sampler in self.samplers:
                sampler.advance()
            return result

        def step_and_meet(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            result = step(*args, **kwargs)
            if engine.global_steps == before:
                return result  # gradients are still being accumulated
            if self.samplers and self._backwards == 0:
                raise SwarmError(
                    "swarm.sampler counts what was trained on, and saw nothing; "
                    "call engine.backward(loss), not loss.backward()"
                )
            self._backwards = 0
            self.window.steps += 1
            self._meet_if_due(engine.global_steps)
            return result

        engine.backward, engine.step = backward_and_record, step_and_meet
