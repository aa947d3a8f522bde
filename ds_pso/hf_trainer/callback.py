"""A callback that lets a Hugging Face ``Trainer`` under DeepSpeed train a particle."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint
from transformers.training_args import trainer_log_levels
from transformers.utils import is_peft_available
from transformers.utils import logging as transformers_logging

from ds_pso import checkpoint
from ds_pso.accelerate import SequencePart, see_the_particle, with_other_samples
from ds_pso.checkpoint.format import plain_data_only
from ds_pso.config import parallelism
from ds_pso.errors import CheckpointError, ConfigError, UnsupportedError
from ds_pso.metrics import deepspeed_monitor
from ds_pso.metrics.records import SyncRecord
from ds_pso.swarm import Swarm
from ds_pso.utils.wrappers import has_wrappers

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Batches = DataLoader[object]


class SwarmCallback(TrainerCallback):
    """``trainer.add_callback(SwarmCallback(swarm, trainer))`` makes the Trainer's model a particle of the swarm.

    Every rank trains on its own part of the data, sharded over all P x S ranks. The Trainer writes to
    ``output_dir/particle_<i>``, and continues from there. Evaluations during training see the consensus of the
    particles, and their metrics are the mean over the particles, so that all decide alike which step was the best
    and when to stop. At the end every particle holds the consensus, and ``trainer.save_model()`` of particle 0
    writes it to ``output_dir``; but with ``"sync_interval": "never"`` each is the expert that it has become.

    Resuming runs no code that lies in a checkpoint. Particle 0 alone shows progress, tables and transformers' INFO
    lines.

    For that it wraps ``get_train_dataloader``, ``evaluate``, ``evaluation_loop``, ``train``, ``log``, ``log_metrics``
    and what loads checkpoints, of this Trainer; and what divides sequences, of its Accelerator.

    Args:
        swarm: what ``ds_pso.init`` returned, before ``TrainingArguments`` was made.
        trainer: not trained yet.
        evaluate_consensus: false to let each particle evaluate its own weights; the consensus costs an exchange, and
            two copies of the shard in memory.

    Raises:
        ConfigError: the Trainer does not use DeepSpeed.
        UnsupportedError: it is set up in a way that the swarm cannot follow; raised here or by ``train``.
        CheckpointError: by ``train``, if the checkpoint is not the swarm's.
    """

    def __init__(self, swarm: Swarm, trainer: Trainer, *, evaluate_consensus: bool = True) -> None:
        _check_supported(swarm, trainer)
        see_the_particle(swarm.world.layout)
        self.swarm = swarm
        self.trainer = trainer
        self._folder = trainer.args.output_dir  # as the user has named it
        self._data = _ShardedData(swarm, trainer)
        self._evaluation = _Evaluation(swarm, trainer, evaluate_consensus)
        self._checkpoints = _Checkpoints(swarm, trainer, self._folder)
        self._sync_log = _SyncLog()
        swarm.session.has_trainer = True
        trainer.train = self._checkpoints.resuming(trainer.train)
        trainer._load_best_model = _without_code(trainer._load_best_model)
        if swarm.has_sync_points:
            trainer.evaluate = self._evaluation.of_consensus(trainer.evaluate)
            trainer.evaluation_loop = self._evaluation.averaged(trainer.evaluation_loop)
            trainer.log = self._sync_log.beside_losses(trainer.log)
            swarm.on_sync(self._sync_log.take)
        if swarm.num_particles > 1:
            trainer.args.output_dir = str(Path(self._folder, f"particle_{swarm.particle}"))
            if trainer.args.should_save:  # as the Trainer does: a model card is written even if no checkpoint was
                Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
            trainer.get_train_dataloader = self._data.sharded(trainer.get_train_dataloader)
            trainer.accelerator.deepspeed_ulysses_dl_adapter = self._data.divided
            _leave_to_the_leader(swarm, trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Join with the engine, which is there now; continue if the Trainer does."""
        swarm = self.swarm
        if swarm.config.total_steps is None:
            swarm.config = swarm.config.model_copy(update={"total_steps": state.max_steps})
        swarm.attach(self.trainer.deepspeed)  # gives all particles the same weights, whatever was loaded
        if state.global_step > 0 and swarm.has_sync_points:
            step = self._checkpoints.load(_step_folder(args, state))
            swarm.session.metrics.rewind(step)
        self._data.resume(int((state.epoch or 0.0) + 1e-6), skips=state.global_step > 0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._data.skips = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._data.begin_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not args.save_only_model and self.swarm.has_sync_points:
            checkpoint.save_part(self.swarm.session, _step_folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint and self.swarm.has_sync_points:
            self._checkpoints.load(Path(state.best_model_checkpoint))  # what the rule keeps of the model, too
        else:
            self.swarm.finish_pending()
        if not self.swarm.config.never_syncs:  # or they are experts, which the script combines
            self.swarm.merge()
        if self.swarm.particle == 0:
            args.output_dir = self._folder


class _ShardedData:
    """The Trainer's training data, split over all ranks of the swarm; Accelerate would split it over a particle.

    Attributes:
        epoch: the next one to begin.
        skips: the Trainer has resumed, and reads on to where it was.
    """

    def __init__(self, swarm: Swarm, trainer: Trainer) -> None:
        self._layout = swarm.world.layout
        self._trainer = trainer
        self._given: Batches | None = None
        self._share_by(parallelism.tensor_parallel_size(swarm.ds_config))
        self._shuffled: DistributedSampler[object] | IterableDatasetShard | None = None
        self.epoch = 0
        self.skips = False
        self._begun = 0  # epochs, since the training began or was resumed

    def _share_by(self, ranks_per_sample: int) -> None:
        """Divide the data over groups of so many ranks."""
        self._rank = self._layout.rank // ranks_per_sample
        self._num_ranks = self._layout.world_size // ranks_per_sample

    def resume(self, epoch: int, *, skips: bool) -> None:
        """Begin with this epoch."""
        self.epoch, self.skips, self._begun = epoch, skips, 0

    def begin_epoch(self) -> None:
        """Shuffle anew."""
        self._begun += 1
        if self.skips and self._begun > 1 and isinstance(self._shuffled, IterableDatasetShard):
            self.skips = False
            if self._layout.rank == 0:
                warnings.warn(
                    "resumed in a later pass over a stream: the Trainer finds its place in the first pass only, so "
                    "some samples are seen again or later; a dataset with a length resumes exactly",
                    stacklevel=2,
                )
        if self._shuffled is not None:
            self._shuffled.set_epoch(self.epoch)
        self.epoch += 1

    def sharded(self, get_train_dataloader: Callable[[], Batches]) -> Callable[[], Batches]:
        """Wrap ``Trainer.get_train_dataloader``."""

        def get_sharded() -> Batches:
            accelerator = self._trainer.accelerator
            accelerator.prepare = lambda loader: loader
            try:
                return self._shard(get_train_dataloader())
            finally:
                del accelerator.prepare  # of this object; its class has one

        return get_sharded

    def divided(self, loader: Batches, model: object) -> Batches:
        """Stand in for ``Accelerator.deepspeed_ulysses_dl_adapter``, which divides sequences over ranks.

        The adapter takes batches of each of these ranks in turn, and the Trainer counts with as many more. It has no
        dataset in which one could skip to where training was. Here the ranks of a sequence read the same samples.
        """
        assert self._given is not None
        size = self._trainer.accelerator.parallelism_config.sp_size
        self._share_by(size)
        return self._shard(self._given, SequencePart(self._given.collate_fn, self._layout.shard_rank, size))

    def _shard(self, loader: Batches, collate_fn: SequencePart | None = None) -> Batches:
        self._given, dataset = loader, loader.dataset
        sampler: DistributedSampler[object] | None = None
        if loader.batch_size is None:
            raise UnsupportedError(
                "the Trainer's train loader has a batch sampler: the swarm splits the data over its ranks itself; give "
                "it a batch_size instead"
            )
        if isinstance(dataset, IterableDataset):
            dataset = IterableDatasetShard(
                dataset, loader.batch_size, True, num_processes=self._num_ranks, process_index=self._rank
            )
            self._shuffled = dataset
        else:
            self._shuffled = sampler = self._sampler(loader)
        return with_other_samples(loader, dataset, loader.batch_size, sampler, loader.drop_last, collate_fn)

    def _sampler(self, loader: Batches) -> DistributedSampler[object]:
        args, ranks = self._trainer.args, self._num_ranks
        num_samples = len(loader.dataset)  # type: ignore[arg-type]
        if not isinstance(loader.sampler, RandomSampler | SequentialSampler):
            raise UnsupportedError(
                f"the Trainer's train loader has a {type(loader.sampler).__name__}: the swarm splits the data over "
                "its ranks itself, at random or in sequence; remove the sampler"
            )
        if num_samples < ranks:
            raise ConfigError(f"the train dataset has {num_samples} samples for {ranks} ranks; use more")
        return DistributedSampler(
            loader.dataset,
            ranks,
            self._rank,
            shuffle=isinstance(loader.sampler, RandomSampler),
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=True,  # all ranks take as many steps
        )


class _Evaluation:
    """Evaluations during training: of which weights, and what all particles make of the metrics."""

    def __init__(self, swarm: Swarm, trainer: Trainer, evaluate_consensus: bool) -> None:
        self._swarm = swarm
        self._trainer = trainer
        self._evaluate_consensus = evaluate_consensus
        self._goes_on = False

    def of_consensus(self, evaluate: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        """Wrap ``Trainer.evaluate``."""

        def evaluate_consensus(*args: object, **kwargs: object) -> dict[str, float]:
            if not self._trainer.is_in_train or self._goes_on:  # it calls itself if there are several datasets
                return evaluate(*args, **kwargs)
            self._goes_on = True
            try:
                if not self._evaluate_consensus:
                    return evaluate(*args, **kwargs)
                with self._swarm.consensus():
                    return evaluate(*args, **kwargs)
            finally:
                self._goes_on = False

        return evaluate_consensus

    def averaged(self, evaluation_loop: Callable[..., EvalLoopOutput]) -> Callable[..., EvalLoopOutput]:
        """Wrap ``Trainer.evaluation_loop``: best model, early stopping and schedulers go by the numbers it returns."""

        def average(*args: object, **kwargs: object) -> EvalLoopOutput:
            output = evaluation_loop(*args, **kwargs)
            if self._goes_on:
                swarm = self._swarm
                mine = {name: float(v) for name, v in output.metrics.items() if isinstance(v, int | float)}
                ranks = swarm.world.coordinator.gather("metrics of an evaluation", mine)
                for name in mine:
                    found = [rank[name] for rank in ranks if name in rank]
                    output.metrics[name] = sum(found) / len(found)
                if "eval_loss" in mine:
                    size = swarm.world.layout.particle_size
                    swarm.log("held_out", losses=[rank["eval_loss"] for rank in ranks[::size]])
            return output

        return average


class _SyncLog:
    """Logs the last sync beside the training loss."""

    def __init__(self) -> None:
        self._record: SyncRecord | None = None  # not logged yet

    def take(self, record: SyncRecord) -> None:
        """Keep it for the next log; for ``Swarm.on_sync``."""
        self._record = record

    def beside_losses(self, log_values: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``Trainer.log``."""

        def log_sync_too(logs: dict[str, float], *args: object, **kwargs: object) -> None:
            if "loss" in logs and self._record is not None:
                logs |= {name: value for name, value, _ in deepspeed_monitor.events(self._record, 0)}
                self._record = None
            log_values(logs, *args, **kwargs)

        return log_sync_too


class _Checkpoints:
    """The Trainer's checkpoints, of which each particle has its own, and the swarm's part in them.

    Args:
        folder: in which each particle has a folder of its own.
    """

    def __init__(self, swarm: Swarm, trainer: Trainer, folder: str) -> None:
        self._swarm = swarm
        self._trainer = trainer
        self._folder = folder

    def resuming(self, train: Callable[..., Result]) -> Callable[..., Result]:
        """Wrap ``Trainer.train``: whatever folder the user names, each particle continues from its own of that step."""

        def train_from_own(resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object) -> Result:
            resume_from_checkpoint = _as_meant(resume_from_checkpoint)
            if resume_from_checkpoint:
                trainer = self._trainer
                trainer._prepare_for_training = _without_code(trainer._prepare_for_training)  # the engine's, too
                trainer._load_rng_state = _without_code(trainer._load_rng_state)
            if resume_from_checkpoint and self._swarm.has_sync_points:
                resume_from_checkpoint = str(self._find(resume_from_checkpoint))
            return train(resume_from_checkpoint, *args, **kwargs)

        return train_from_own

    def load(self, folder: Path) -> int:
        """Load the swarm's part of a checkpoint, and return its step."""
        return checkpoint.load_part(self._swarm.session, folder, strict=not _is_adapter(self._trainer.model))

    def _find(self, named: str | bool) -> Path:
        """Return this particle's, checked: all particles have one of the same step, and its files are whole."""
        swarm, mine = self._swarm, Path(self._trainer.args.output_dir)
        with swarm.world.coordinator.agree("looking for the checkpoint"):
            if isinstance(named, str):
                path = Path(named)
                elsewhere = path.parent.resolve() not in (Path(self._folder).resolve(), *_siblings(mine))
                if elsewhere and swarm.num_particles > 1:
                    raise CheckpointError(
                        f"resume_from_checkpoint = {named}: not in {self._folder}, in which each particle has its own; "
                        "set TrainingArguments.output_dir to the folder that the checkpoint was written to"
                    )
                found = mine / path.name if swarm.num_particles > 1 else path
            else:
                last = get_last_checkpoint(str(mine)) if mine.is_dir() else None
                if last is None:
                    raise CheckpointError(f"{mine}: no checkpoint to resume; check the path, or start without resuming")
                found = Path(last)
        names = sorted(set(swarm.world.coordinator.gather("the step to continue from", found.name)))
        if len(names) > 1:
            raise CheckpointError(
                f"{self._folder}: the particles would continue from different steps, {' and '.join(names)}; name one "
                "that all have in resume_from_checkpoint, or move the newer ones away",
                agreed=True,
            )
        checkpoint.check_part(swarm.session, found)
        log.info("continuing from %s", found)
        return found


def _without_code(load: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a method that reads a checkpoint: DeepSpeed would run what its pickles say."""

    def load_plain_data(*args: object, **kwargs: object) -> Result:
        with plain_data_only():
            return load(*args, **kwargs)

    return load_plain_data


def _as_meant(resume: str | bool | None) -> str | bool | None:
    """Return what ``--resume_from_checkpoint True`` on a command line means, which HfArgumentParser leaves a string."""
    words: dict[str, bool | None] = {"true": True, "false": False, "none": None, "": None}
    if isinstance(resume, str) and resume.lower() in words and not Path(resume or "none").is_dir():
        return words[resume.lower()]
    return resume


def _leave_to_the_leader(swarm: Swarm, trainer: Trainer) -> None:
    """Leave to it what is said once: progress, tables of metrics, INFO lines of transformers."""
    if swarm.particle > 0:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.log_metrics = _print_nothing
        trainer.accelerator.print = _print_nothing
    if not swarm.is_leader:
        level = trainer_log_levels[trainer.args.log_level_replica]
        transformers_logging.set_verbosity(max(level, transformers_logging.get_verbosity()))


def _print_nothing(*_: object, **__: object) -> None:
    pass


def _step_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _check_supported(swarm: Swarm, trainer: Trainer) -> None:
    args = trainer.args
    if not trainer.is_deepspeed_enabled:
        raise ConfigError(
            "SwarmCallback: the Trainer does not use DeepSpeed; give TrainingArguments(deepspeed=swarm.ds_config)"
        )
    if swarm.config.remote_checkpoints is not None:
        raise ConfigError(
            "SwarmCallback: swarm.remote_checkpoints: the Trainer writes its own checkpoints, which are not uploaded; "
            "remove it, and copy output_dir"
        )
    if swarm.num_particles > 1:
        _check_several(swarm, trainer)
    if swarm.has_sync_points:
        _refuse(
            args,
            {
                "auto_find_batch_size": (args.auto_find_batch_size, "it builds the engine anew; set it to False"),
                "save_total_limit": (
                    args.save_total_limit == 1,
                    "while a checkpoint is written, no complete one might be left; keep at least 2",
                ),
                "enable_jit_checkpoint": (
                    args.enable_jit_checkpoint,
                    "it saves nothing of the swarm, and one particle would stop alone; set it to False",
                ),
            },
        )


def _check_several(swarm: Swarm, trainer: Trainer) -> None:
    """Refuse what several particles would do to one another."""
    args = trainer.args
    if swarm.config.per_particle:
        raise ConfigError(
            "SwarmCallback: swarm.per_particle: the Trainer counts epochs and steps by one batch size for all; remove "
            "it, or use a script of your own"
        )
    if len(swarm.world.membership.reachable()) < swarm.num_particles:
        raise ConfigError(
            'SwarmCallback: swarm.transport = "elastic": the Trainer counts its own steps, and a particle that joins '
            'late would train on after the others; use "static"'
        )
    if has_wrappers(trainer.model):
        raise UnsupportedError(
            "SwarmCallback: the Trainer's model, or a layer of it, is wrapped (torch.compile, checkpoint_wrapper), and "
            "would be saved under names that nobody looks for; give the Trainer the model itself, and let "
            "TrainingArguments compile it (torch_compile=True) or checkpoint its activations"
        )
    _refuse(
        args,
        {
            "train_sampling_strategy": (
                args.train_sampling_strategy not in ("random", "sequential"),
                'the swarm splits the data over its ranks itself; use "random" or "sequential"',
            ),
            "push_to_hub": (args.push_to_hub, "every particle would push; push what trainer.save_model has written"),
            "save_on_each_node": (args.save_on_each_node, "two nodes of a particle would differ; use a shared disk"),
        },
    )


def _refuse(args: TrainingArguments, refused: Mapping[str, tuple[bool, str]]) -> None:
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise UnsupportedError(f"TrainingArguments.{name} = {getattr(args, name)!r}: {reason}")


def _siblings(particle: Path) -> list[Path]:
    return [path.resolve() for path in particle.parent.glob("particle_*")]


def _is_adapter(model: object) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
