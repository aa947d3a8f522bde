"""A callback that lets a Hugging Face ``Trainer`` under DeepSpeed train a particle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.data_loader import IterableDatasetShard
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint
from transformers.utils import is_peft_available

from ds_pso import checkpoint
from ds_pso.errors import CheckpointError, ConfigError, UnsupportedError
from ds_pso.metrics import deepspeed_monitor
from ds_pso.swarm import Swarm


class SwarmCallback(TrainerCallback):
    """``trainer.add_callback(SwarmCallback(swarm, trainer))`` makes the Trainer's model a particle of the swarm.

    Every rank trains on its own part of the data, sharded over all P x S ranks. The Trainer writes to
    ``output_dir/particle_<i>``, and continues from there. Evaluations during training see the consensus of the
    particles, and their metrics are the mean over the particles, so that all decide alike which step was the best
    and when to stop. At the end every particle holds the consensus, and ``trainer.save_model()`` of particle 0
    writes it to ``output_dir``.

    For that it wraps ``get_train_dataloader``, ``evaluate``, ``evaluation_loop``, ``train`` and ``log`` of this
    Trainer.

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
        _let_accelerate_see_the_particle(swarm)
        self.swarm = swarm
        self.trainer = trainer
        self.evaluate_consensus = evaluate_consensus
        self._folder = trainer.args.output_dir  # as the user has named it
        self._shuffled: Any = None  # has to be told the epoch
        self._epoch = 0
        self._evaluating = False
        self._logged_sync = -1
        if swarm.num_particles > 1:
            trainer.args.output_dir = str(Path(self._folder, f"particle_{swarm.particle}"))
            trainer.get_train_dataloader = self._sharding(trainer.get_train_dataloader)
            trainer.evaluate = self._of_the_consensus(trainer.evaluate)
            trainer.evaluation_loop = self._agreeing(trainer.evaluation_loop)
            trainer.train = self._resuming(trainer.train)
            trainer.log = self._logging(trainer.log)
            if swarm.particle > 0:  # one progress bar is enough
                trainer.remove_callback(ProgressCallback)
                trainer.remove_callback(PrinterCallback)

    # -- data -------------------------------------------------------------------------------

    def _sharding(self, get_train_dataloader: Callable[[], DataLoader[Any]]) -> Callable[[], DataLoader[Any]]:
        """The Trainer's loader, split over all ranks of the swarm; Accelerate would split it over a particle."""

        def sharded() -> DataLoader[Any]:
            accelerator = self.trainer.accelerator
            accelerator.prepare = lambda loader: loader
            try:
                return self._shard(get_train_dataloader())
            finally:
                del accelerator.prepare  # of this object; its class has one

        return sharded

    def _shard(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        args, layout, dataset = self.trainer.args, self.swarm.world.layout, loader.dataset
        sampler: DistributedSampler[Any] | None = None
        if loader.batch_size is None:
            raise UnsupportedError(
                "the Trainer's train loader has a batch sampler: the swarm splits the data over its ranks itself; give "
                "it a batch_size instead"
            )
        if isinstance(dataset, IterableDataset):
            self._shuffled = dataset = IterableDatasetShard(
                dataset, loader.batch_size, True, num_processes=layout.world_size, process_index=layout.rank
            )
        else:
            if not isinstance(loader.sampler, RandomSampler | SequentialSampler):
                raise UnsupportedError(
                    f"the Trainer's train loader has a {type(loader.sampler).__name__}: the swarm splits the data over "
                    "its ranks itself, at random or in sequence; remove the sampler"
                )
            if len(dataset) < layout.world_size:  # type: ignore[arg-type]
                raise ConfigError(
                    f"the train dataset has {len(dataset)} samples for {layout.world_size} ranks; use more"  # type: ignore[arg-type]
                )
            self._shuffled = sampler = DistributedSampler(
                dataset,
                layout.world_size,
                layout.rank,
                shuffle=isinstance(loader.sampler, RandomSampler),
                seed=args.seed if args.data_seed is None else args.data_seed,
                drop_last=True,  # all ranks take as many steps
            )
        return DataLoader(
            dataset,
            batch_size=loader.batch_size,
            sampler=sampler,
            drop_last=loader.drop_last,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            in_order=loader.in_order,
        )

    # -- evaluation, logging ----------------------------------------------------------------

    def _of_the_consensus(self, evaluate: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        def evaluated(*args: Any, **kwargs: Any) -> dict[str, float]:
            if not self.trainer.is_in_train or self._evaluating:  # it calls itself if there are several datasets
                return evaluate(*args, **kwargs)
            self._evaluating = True
            try:
                if not self.evaluate_consensus:
                    return evaluate(*args, **kwargs)
                with self.swarm.consensus():
                    return evaluate(*args, **kwargs)
            finally:
                self._evaluating = False

        return evaluated

    def _agreeing(self, evaluation_loop: Callable[..., EvalLoopOutput]) -> Callable[..., EvalLoopOutput]:
        """Metrics are the mean over the particles: best model, early stopping and schedulers go by these numbers."""

        def agreed(*args: Any, **kwargs: Any) -> EvalLoopOutput:
            output = evaluation_loop(*args, **kwargs)
            if self._evaluating:
                mine = {name: float(v) for name, v in output.metrics.items() if isinstance(v, int | float)}
                ranks = self.swarm.world.coordinator.gather("metrics of an evaluation", mine)
                for name in mine:
                    found = [rank[name] for rank in ranks if name in rank]
                    output.metrics[name] = sum(found) / len(found)
                if "eval_loss" in mine:
                    size = self.swarm.world.layout.particle_size
                    self.swarm.log("held_out", losses=[rank["eval_loss"] for rank in ranks[::size]])
            return output

        return agreed

    def _logging(self, log: Callable[..., None]) -> Callable[..., None]:
        """The last sync point beside the training loss."""

        def logged(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            record = self.swarm.last_sync
            if "loss" in logs and record and record.sync != self._logged_sync:
                self._logged_sync = record.sync
                logs |= {name: value for name, value, _ in deepspeed_monitor.events(record, 0)}
            log(logs, *args, **kwargs)

        return logged

    # -- checkpoints ------------------------------------------------------------------------

    def _resuming(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Whatever folder the user names, each particle continues from its own of that step."""

        def trained(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint:
                resume_from_checkpoint = str(self._own_checkpoint(resume_from_checkpoint))
            return train(resume_from_checkpoint, *args, **kwargs)

        return trained

    def _own_checkpoint(self, named: str | bool) -> Path:
        """Checked: all particles have one of the same step, and its files are whole."""
        swarm, mine = self.swarm, Path(self.trainer.args.output_dir)
        with swarm.world.coordinator.agree("looking for the checkpoint"):
            if isinstance(named, str):
                path = Path(named)
                if path.parent.resolve() not in (Path(self._folder).resolve(), *_siblings(mine)):
                    raise CheckpointError(
                        f"resume_from_checkpoint = {named}: not in {self._folder}, in which each particle has its own; "
                        "set TrainingArguments.output_dir to the folder that the checkpoint was written to"
                    )
                found = mine / path.name
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
        return found

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not args.save_only_model and self.swarm.num_particles > 1:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            checkpoint.save_part(self.swarm.session, folder)

    def _load_part(self, folder: str | Path) -> int:
        return checkpoint.load_part(self.swarm.session, Path(folder), strict=not _is_adapter(self.trainer.model))

    # -- the course of training -------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Join with the engine, which is there now; continue if the Trainer does."""
        swarm = self.swarm
        if swarm.config.total_steps is None:
            swarm.config = swarm.config.model_copy(update={"total_steps": state.max_steps})
        swarm.attach(self.trainer.deepspeed)  # gives all particles the same weights, whatever was loaded
        if state.global_step > 0 and swarm.num_particles > 1:
            step = self._load_part(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
            swarm.session.metrics.rewind(step)
        self._epoch = int((state.epoch or 0.0) + 1e-6)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._shuffled is not None:
            self._shuffled.set_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint and self.swarm.num_particles > 1:
            self._load_part(state.best_model_checkpoint)  # what the rule keeps of the model, too
        else:
            self.swarm.finish_pending()
        self.swarm.merge()
        if self.swarm.particle == 0:
            args.output_dir = self._folder


def _check_supported(swarm: Swarm, trainer: Trainer) -> None:
    args = trainer.args
    if not trainer.is_deepspeed_enabled:
        raise ConfigError(
            "SwarmCallback: the Trainer does not use DeepSpeed; give TrainingArguments(deepspeed=swarm.ds_config)"
        )
    if swarm.num_particles == 1:
        return
    if len(swarm.world.membership.reachable()) < swarm.num_particles:
        raise ConfigError(
            'SwarmCallback: swarm.transport = "elastic": the Trainer counts its own steps, and a particle that joins '
            'late would train on after the others; use "static"'
        )
    refused = {
        "auto_find_batch_size": (args.auto_find_batch_size, "it builds the engine anew; set it to False"),
        "train_sampling_strategy": (
            args.train_sampling_strategy not in ("random", "sequential"),
            'the swarm splits the data over its ranks itself; use "random" or "sequential"',
        ),
        "save_total_limit": (
            args.save_total_limit == 1,
            "while a checkpoint is written, no complete one might be left; keep at least 2",
        ),
        "push_to_hub": (args.push_to_hub, "every particle would push; push what trainer.save_model has written"),
        "save_on_each_node": (args.save_on_each_node, "two nodes of a particle would differ; use a shared disk"),
        "enable_jit_checkpoint": (args.enable_jit_checkpoint, "one particle would stop alone; set it to False"),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise UnsupportedError(f"TrainingArguments.{name} = {getattr(args, name)!r}: {reason}")


def _let_accelerate_see_the_particle(swarm: Swarm) -> None:
    """Without an accelerator every rank takes itself for the only one, under DeepSpeed (Accelerate 1.15).

    All would train on the same samples, write the same files, and fail to gather what they have evaluated.
    """
    for state in (PartialState(), AcceleratorState()):
        state.num_processes = swarm.world.layout.particle_size
        state.process_index = swarm.world.layout.shard_rank
        state.local_process_index = int(os.environ["LOCAL_RANK"])


def _siblings(particle: Path) -> list[Path]:
    return [path.resolve() for path in particle.parent.glob("particle_*")]


def _is_adapter(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)
