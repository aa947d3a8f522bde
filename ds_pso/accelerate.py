"""A script under Hugging Face Accelerate: what ``swarm.prepare`` does in place of ``accelerator.prepare``."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import DataLoaderShard, IterableDatasetShard, prepare_data_loader
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DummyOptim, DummyScheduler
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from ds_pso import checkpoint
from ds_pso.config import parallelism
from ds_pso.config.swap_folders import give_each_a_swap_folder
from ds_pso.distributed.layout import Layout
from ds_pso.errors import ConfigError, SwarmError, UnsupportedError
from ds_pso.metrics import deepspeed_monitor
from ds_pso.sampler import SwarmSampler

if TYPE_CHECKING:
    from ds_pso.swarm import Swarm
    from ds_pso.sync.assessment import Probe

Batches = DataLoader[object]
Counted = Literal["epochs", "steps"]
Collate = Callable[[list[Any]], Any]
_SCHEDULE = "accelerate_scheduler"  # what a checkpoint of the engine calls the state of the script's scheduler


def prepare(
    swarm: Swarm, accelerator: Accelerator, objects: Sequence[object], probe: Probe | None, schedule: Counted
) -> tuple[object, ...]:
    """Do what ``Swarm.prepare`` says; return the prepared objects in the order of ``objects``."""
    if schedule not in ("epochs", "steps"):
        raise ConfigError(f'swarm.prepare schedule = {schedule!r}: must be "epochs" or "steps"')
    _check_accelerator(swarm, accelerator)
    given = _Given.of(objects)
    if schedule == "epochs" and given.scheduler is not None:
        _check_lengths(swarm)
    if swarm.world.membership.can_fail and isinstance(given.scheduler, LRScheduler):
        raise UnsupportedError(
            f"swarm.prepare: a {type(given.scheduler).__name__} of the script in an elastic swarm: a particle that "
            "comes back would begin it anew; describe it in the JSON, and give accelerate.utils.DummyScheduler",
            agreed=True,
        )
    see_the_particle(swarm.world.layout)
    _take_parallelism(swarm, accelerator)
    batch_size = _batch_size(swarm, accelerator, given.data)
    _fill_in(swarm, accelerator, batch_size)
    faster = swarm.num_particles if schedule == "epochs" else 1
    mine = [obj for obj in objects if obj is not given.data]
    prepared = accelerator.prepare(*(_sooner(obj, faster) if isinstance(obj, DummyScheduler) else obj for obj in mine))
    found = dict(zip(map(id, mine), prepared if len(mine) > 1 else [prepared], strict=True))
    swarm.attach(found[id(given.model)], probe)
    if given.scheduler is not None and _is_stepped_by_the_script(found[id(given.scheduler)]):
        _ticks(found[id(given.scheduler)], faster, warns=swarm.is_leader)
        _keep(found[id(given.model)], found[id(given.scheduler)])
    loader = None
    if given.data is not None:
        found[id(given.data)] = loader = _shard(swarm, accelerator, given.data, batch_size)
    if swarm.num_particles > 1:
        _guard(accelerator, loader)
    _Checkpoints(swarm, accelerator).install()
    return tuple(found[id(obj)] for obj in objects)


def see_the_particle(layout: Layout) -> None:
    """Set the ranks in Accelerate 1.15, where without an accelerator each takes itself for the only one.

    All would train on the same samples, write the same files, and fail to gather what they have evaluated.
    """
    for state in (PartialState(), AcceleratorState()):
        state.num_processes = layout.particle_size
        state.process_index = layout.shard_rank
        state.local_process_index = int(os.environ["LOCAL_RANK"])


def with_other_samples(
    loader: Batches,
    dataset: object,
    batch_size: int,
    sampler: Sampler[Any] | None,
    drop_last: bool,
    collate_fn: Collate | None = None,
) -> Batches:
    """Return a loader like ``loader`` in everything else; so is ``collate_fn``, if it is not given."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        collate_fn=loader.collate_fn if collate_fn is None else collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


# -- what was given -------------------------------------------------------------------------


def _check_accelerator(swarm: Swarm, accelerator: object) -> None:
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(
            f"swarm.prepare(accelerator, model, ...): the first argument is a {type(accelerator).__name__}; give the "
            "accelerate.Accelerator that was made after ds_pso.init"
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            f"swarm.prepare: the Accelerator is of type {accelerator.distributed_type.value}, and a particle is a "
            "DeepSpeed job; start with accelerate launch --use_deepspeed, or make it with "
            "Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))"
        )
    if swarm.world.peers.backend == "simulated" and swarm.num_particles > 1:
        raise UnsupportedError(
            "swarm.prepare: Accelerate has one state per process, and a simulation has all particles in one; call "
            "deepspeed.initialize and swarm.attach in what is simulated",
            agreed=True,
        )


def _check_lengths(swarm: Swarm) -> None:
    """Refuse particles that would see schedules of unequal lengths, and so train at unequal rates."""
    if len({entry.samples_of_a_rank for entry in swarm.config.per_particle}) > 1:
        raise ConfigError(
            'swarm.prepare schedule = "epochs": with swarm.per_particle the particles\' loaders are not equally long, '
            "and none is P times as long as its part of an epoch, so that their learning rates would be wrong; let the "
            'script count optimizer steps, x accelerator.num_processes, and give "steps"'
        )


@dataclass
class _Given:
    """The objects that ``prepare`` was given, by kind; evaluation loaders are among the rest."""

    model: torch.nn.Module
    scheduler: object = None
    data: Batches | None = None  # the training loader

    @classmethod
    def of(cls, objects: Sequence[object]) -> _Given:
        """Sort them, and refuse what cannot be prepared.

        Raises:
            ConfigError: something is missing, given twice, or of another kind.
        """
        kinds: dict[str, list[Any]] = {"model": [], "optimizer": [], "scheduler": [], "loader": []}
        for obj in objects:
            if getattr(obj, "_is_accelerate_prepared", False) or isinstance(obj, DataLoaderShard):
                raise ConfigError(
                    f"swarm.prepare: the {type(obj).__name__} was prepared before, for one particle; give "
                    "swarm.prepare what accelerator.prepare was given, and leave that call out"
                )
            kinds[_kind_of(obj)].append(obj)
        for kind in ("model", "optimizer"):
            if len(kinds[kind]) != 1:
                remedy = (
                    "; where the JSON describes it, give accelerate.utils.DummyOptim" if kind == "optimizer" else ""
                )
                raise ConfigError(f"swarm.prepare was given {len(kinds[kind])} {kind}s: it needs one{remedy}")
        if len(kinds["scheduler"]) > 1:
            raise ConfigError(f"swarm.prepare was given {len(kinds['scheduler'])} schedulers: give it one")
        (model,), loaders = kinds["model"], kinds["loader"]
        scheduler = kinds["scheduler"][0] if kinds["scheduler"] else None
        return cls(model, scheduler, _training_loader(loaders) if loaders else None)


def _kind_of(obj: object) -> str:
    if isinstance(obj, torch.nn.Module):
        return "model"
    if isinstance(obj, Optimizer | DummyOptim):
        return "optimizer"
    if isinstance(obj, LRScheduler | DummyScheduler) or type(obj).__name__ in VALID_LR_SCHEDULES:
        return "scheduler"
    if isinstance(obj, DataLoader):
        return "loader"
    raise ConfigError(
        f"swarm.prepare was given a {type(obj).__name__}: it takes a model, an optimizer, a scheduler and "
        "torch.utils.data.DataLoaders"
    )


def _training_loader(loaders: list[Batches]) -> Batches:
    """Return the one to train on: the only one, or the only one that shuffles."""
    shuffled = loaders if len(loaders) == 1 else [loader for loader in loaders if _is_shuffled(loader)]
    if len(shuffled) != 1:
        raise ConfigError(
            f"swarm.prepare was given {len(loaders)} loaders, of which {len(shuffled)} shuffle, and cannot tell which "
            "is for training: give it that one alone, and the others to accelerator.prepare"
        )
    return shuffled[0]


def _is_shuffled(loader: Batches) -> bool:
    return not isinstance(loader.dataset, IterableDataset) and isinstance(loader.sampler, RandomSampler | SwarmSampler)


# -- configuration and schedule -------------------------------------------------------------


def _batch_size(swarm: Swarm, accelerator: Accelerator, loader: Batches | None) -> int:
    """Return the size of a rank's micro batch; 0 without a training loader."""
    if loader is None:
        return 0
    if loader.batch_size is None:
        raise UnsupportedError(
            "swarm.prepare: the training loader has a batch sampler, and the swarm shards the data over its ranks "
            "itself; give the loader a batch_size instead",
            agreed=True,
        )
    if not accelerator.split_batches:
        return int(loader.batch_size)
    size = swarm.world.layout.particle_size // swarm.ranks_per_sample
    if loader.batch_size % size:
        raise ConfigError(
            f"split_batches = True: a batch of {loader.batch_size} cannot be split over the {size} ranks of a "
            "particle; make it a multiple"
        )
    return int(loader.batch_size) // size


def _take_parallelism(swarm: Swarm, accelerator: Accelerator) -> None:
    """Let the config say over how many ranks sequences are divided, as the Accelerator does."""
    parallelism_config = accelerator.parallelism_config
    if parallelism_config is not None and parallelism_config.sp_size > 1:
        sections = (swarm.ds_config, accelerator.deepspeed_plugin.deepspeed_config)
        for section in sections:
            section.setdefault(parallelism.SEQUENCE, parallelism_config.sp_size)
        parallelism.check_divides(swarm.ds_config, swarm.world.layout.particle_size)


def _fill_in(swarm: Swarm, accelerator: Accelerator, batch_size: int) -> None:
    """Complete the config that Accelerate has read: the micro batch, and the particle's own folders."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    if batch_size and accelerator.deepspeed_plugin.is_auto("train_micro_batch_size_per_gpu"):
        config["train_micro_batch_size_per_gpu"] = batch_size  # Accelerate would ask the loader, and does not get it
    for name in deepspeed_monitor.OWN_FOLDERS:
        if name in config and name in swarm.ds_config:
            config[name] = copy.deepcopy(swarm.ds_config[name])
    if swarm.num_particles > 1:
        give_each_a_swap_folder(config, swarm.particle)


def _sooner(stand_in: DummyScheduler, faster: int) -> DummyScheduler:
    """Return a stand-in for a schedule of ``1 / faster`` of the length; Accelerate divides it by the particle's ranks.

    Its warm-up counts optimizer steps, as under Accelerate alone.
    """
    if stand_in.total_num_steps is None:
        return stand_in
    changed = copy.copy(stand_in)
    changed.total_num_steps = math.ceil(stand_in.total_num_steps / faster)
    return changed


def _is_stepped_by_the_script(scheduler: object) -> bool:
    """Return false for what DeepSpeed steps: that counts optimizer steps, and is part of DeepSpeed's checkpoints."""
    return isinstance(scheduler, AcceleratedScheduler) and not isinstance(scheduler, DeepSpeedSchedulerWrapper)


def _ticks(scheduler: Any, faster: int, *, warns: bool) -> None:
    """Let a scheduler that the script steps advance ``faster`` times as far at each optimizer step.

    Accelerate advances it once for each rank of a particle.
    """
    if faster == 1:
        return
    advance, is_zero = scheduler.step, False

    def step(*args: object, **kwargs: object) -> None:
        nonlocal is_zero
        per_step = scheduler.step_with_optimizer and scheduler.gradient_state.sync_gradients
        if per_step and is_zero and warns:
            is_zero = False
            warnings.warn(
                "the learning-rate schedule has ended at 0, and training goes on: swarm.prepare takes its length for "
                "epochs x len(loader), of the loader before it was prepared; if it is optimizer steps x "
                'accelerator.num_processes, give swarm.prepare schedule="steps"',
                stacklevel=2,
            )
        before = scheduler.get_last_lr()
        for _ in range(faster if per_step else 1):
            advance(*args, **kwargs)
        is_zero = is_zero or (any(before) and not any(scheduler.get_last_lr()))

    scheduler.step = step


def _keep(engine: Any, scheduler: AcceleratedScheduler) -> None:
    """Let checkpoints of the engine, and so those of ``swarm.save``, hold the place of the script's scheduler."""
    save_checkpoint, load_checkpoint = engine.save_checkpoint, engine.load_checkpoint

    def save(save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None, **more: Any) -> Any:
        state = {**(client_state or {}), _SCHEDULE: scheduler.state_dict()}
        return save_checkpoint(save_dir, tag=tag, client_state=state, **more)

    def load(load_dir: str, tag: str | None = None, **more: Any) -> Any:
        path, client_state = load_checkpoint(load_dir, tag=tag, **more)
        if client_state and _SCHEDULE in client_state:
            scheduler.load_state_dict(client_state[_SCHEDULE])
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save, load


# -- data -----------------------------------------------------------------------------------


def _shard(swarm: Swarm, accelerator: Accelerator, loader: Batches, batch_size: int) -> Batches:
    """Return a loader of this rank's part of the training data, whose batches are put on the accelerator's device."""
    session, sampler = swarm.session, None
    collate: Collate | None = None
    if swarm.engine.sequence_parallel_size > 1:
        collate = SequencePart(loader.collate_fn, session.world.layout.shard_rank, swarm.engine.sequence_parallel_size)
    if isinstance(loader.dataset, IterableDataset):
        dataset = IterableDatasetShard(
            loader.dataset, batch_size, True, num_processes=session.num_data_ranks, process_index=session.data_rank
        )
        mine = with_other_samples(loader, dataset, batch_size, None, loader.drop_last, collate)
    else:
        sampler = _sampler(swarm, accelerator, loader, batch_size)
        mine = with_other_samples(loader, loader.dataset, batch_size, sampler, True, collate)
    prepared = prepare_data_loader(
        mine,
        accelerator.device,
        num_processes=1,  # it has been sharded
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )
    prepared._is_accelerate_prepared = True
    accelerator._dataloaders.append(prepared)
    if sampler is not None:
        _follow(accelerator, prepared, sampler)
    return prepared


class SequencePart:
    """Collates the samples of a batch, and keeps the part of each sequence that is this rank's.

    The batches are those of DeepSpeed's UlyssesSPDataLoaderAdapter, with which Accelerate wraps loaders: the labels,
    shifted by one, are ``shift_labels``. The adapter gathers batches of all ranks and hands them out one after the
    other, and so knows its place between two steps alone; here the ranks of a sequence read the same samples.

    Args:
        collate: makes a batch, a dict with tensors of shape (batch, tokens, ...) of "input_ids", "position_ids",
            "labels" and whatever else there is for each token.
        rank: inside the particle.
        size: of the group of ranks that share sequences.
    """

    def __init__(self, collate: Collate, rank: int, size: int) -> None:
        self._collate, self._rank, self._size = collate, rank % size, size

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        collated = self._collate(samples)
        if not isinstance(collated, Mapping) or not {"input_ids", "position_ids", "labels"} <= collated.keys():
            raise ConfigError(
                "swarm.prepare: where sequences are divided over ranks, a batch is a dict with input_ids, labels and "
                "position_ids, the places of its tokens; let the collate_fn of the training loader add what is missing"
            )
        batch = dict(collated)
        labels = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)
        batch["shift_labels"] = labels[:, 1:]
        length = batch["input_ids"].shape[1]
        if length % self._size:
            raise ConfigError(
                f"swarm.prepare: sequences of {length} tokens cannot be divided over {self._size} ranks; pad them to a "
                "multiple of that"
            )
        part = length // self._size
        mine = slice(self._rank * part, (self._rank + 1) * part)
        return {
            name: value[:, mine].contiguous() if _is_per_token(value, length) else value
            for name, value in batch.items()
        }


def _is_per_token(value: object, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == length


def _sampler(swarm: Swarm, accelerator: Accelerator, loader: Batches, batch_size: int) -> SwarmSampler:
    given = loader.sampler
    if isinstance(given, SwarmSampler):
        return given
    is_plain = isinstance(given, SequentialSampler) or (
        isinstance(given, RandomSampler) and not given.replacement and given.num_samples == len(given.data_source)
    )
    if not is_plain:
        raise UnsupportedError(
            f"swarm.prepare: the training loader has a {type(given).__name__}, and the swarm shards the data over its "
            "ranks itself, at random or in sequence; give the loader shuffle=True or False instead",
            agreed=True,
        )
    seed = accelerator.dataloader_config.data_seed
    if seed is None:
        generator = getattr(given, "generator", None)
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
    seeds = swarm.world.coordinator.gather("seed of the data", seed)  # a script may seed each rank with its own
    shuffle = isinstance(given, RandomSampler)
    return swarm.sampler(loader.dataset, batch_size=batch_size, shuffle=shuffle, seed=seeds[0])  # type: ignore[arg-type]


def _follow(accelerator: Accelerator, prepared: Any, sampler: SwarmSampler) -> None:
    """Let the sampler say where the loader is: it alone knows the place after a checkpoint was loaded."""
    skip_first_batches = accelerator.skip_first_batches

    def set_epoch(epoch: int) -> None:
        if epoch != prepared.iteration:  # Accelerate itself gives the number of the pass, as this process counts them
            prepared.iteration = epoch
            sampler.set_epoch(epoch)

    def skip(dataloader: Any, num_batches: int = 0) -> Any:
        if dataloader is not prepared:
            return skip_first_batches(dataloader, num_batches)
        sampler.skip_to(num_batches)
        return prepared

    prepared.set_epoch, accelerator.skip_first_batches = set_epoch, skip


def _guard(accelerator: Accelerator, loader: Batches | None) -> None:
    """Refuse to train on a loader that Accelerate has sharded: all particles would see the same samples."""
    backward, state = accelerator.backward, accelerator.gradient_state

    def guarded(loss: torch.Tensor, **kwargs: object) -> None:
        if state.in_dataloader and all(active is not loader for active in state.dataloader_references):
            raise SwarmError(
                "accelerator.backward: the batch comes from a loader that accelerator.prepare has sharded inside the "
                "particle, so that all particles would train on the same samples; give swarm.prepare the training "
                "loader, alone or as the only one that shuffles",
                agreed=True,
            )
        backward(loss, **kwargs)

    accelerator.backward = guarded


# -- checkpoints ----------------------------------------------------------------------------


class _Checkpoints:
    """``save_state`` and ``load_state`` of one Accelerator: a folder for each particle, and the swarm's part in it."""

    def __init__(self, swarm: Swarm, accelerator: Accelerator) -> None:
        self._swarm = swarm
        self._accelerator = accelerator
        self._save, self._load = accelerator.save_state, accelerator.load_state

    def install(self) -> None:
        """Replace the methods of this object."""
        self._swarm.session.has_trainer = True
        self._accelerator.save_state, self._accelerator.load_state = self.save_state, self.load_state
        if self._swarm.num_particles > 1:
            self._accelerator.save_model = self._refuse_model

    def save_state(self, output_dir: str | os.PathLike[str] | None = None, *args: object, **kwargs: object) -> Path:
        """Do what ``Accelerator.save_state`` does, in ``output_dir/particle_<i>``."""
        self._check()
        with self._own_project():
            written = Path(self._save(self._own(output_dir), *args, **kwargs))
        checkpoint.save_part(self._swarm.session, written)
        return written

    def load_state(
        self, input_dir: str | os.PathLike[str] | None = None, load_kwargs: dict[str, object] | None = None, **more: Any
    ) -> None:
        """Do what ``Accelerator.load_state`` does, from ``input_dir/particle_<i>``, after all files were checked."""
        self._check()
        with self._own_project() as project:
            folder = self._newest(project) if input_dir is None else Path(str(self._own(input_dir)))
            checkpoint.check_part(self._swarm.session, folder)
            checkpoint.load_part(self._swarm.session, folder, load=lambda: self._load(str(folder), load_kwargs, **more))

    def _own(self, folder: str | os.PathLike[str] | None) -> str | None:
        """Return the particle's own folder in it."""
        if folder is None:
            return None
        path = Path(folder).expanduser()
        return str(path if self._swarm.num_particles == 1 else self._swarm.world.layout.particle_folder(path))

    @contextlib.contextmanager
    def _own_project(self) -> Iterator[str | None]:
        """Let checkpoints that Accelerate numbers itself lie in a folder of the particle."""
        project = self._accelerator.project_configuration
        before = project.project_dir
        project.project_dir = self._own(before)
        try:
            yield project.project_dir
        finally:
            project.project_dir = before

    def _newest(self, project: str | None) -> Path:
        folders = list(Path(project or ".", "checkpoints").glob("checkpoint_*"))
        names = self._swarm.world.coordinator.gather(
            "the checkpoint to continue from", max((int(path.name.rpartition("_")[2]) for path in folders), default=-1)
        )
        if len(set(names)) > 1 or names[0] < 0:
            raise ConfigError(
                f"accelerator.load_state() without a folder: the newest checkpoints of the ranks are {names} "
                "(-1: none); name one that all particles have"
            )
        return Path(project or ".", "checkpoints", f"checkpoint_{names[0]}")

    def _check(self) -> None:
        if len(self._swarm.world.membership.reachable()) < self._swarm.num_particles:
            raise UnsupportedError(
                "accelerator.save_state and load_state in an elastic swarm: a particle that comes back takes its state "
                "from the others; use swarm.save and swarm.load",
                agreed=True,
            )

    def _refuse_model(self, *_: object, **__: object) -> None:
        raise UnsupportedError(
            "accelerator.save_model: every particle would write its own weights into the same files; write the model "
            "that they agree on with swarm.export(folder), on all ranks",
            agreed=True,
        )
