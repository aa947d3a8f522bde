"""Joins an engine with the swarm: what the config asks for, checked, and made of parts."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from ds_pso.comm.compression import UNCOMPRESSED
from ds_pso.config import parallelism
from ds_pso.config.checks import check_consistent, splits_layers
from ds_pso.config.schema import total_num_steps
from ds_pso.errors import ConfigError, SwarmError, UnsupportedError
from ds_pso.metrics import deepspeed_monitor
from ds_pso.rules import Rule
from ds_pso.session.progress import TrainingProgress
from ds_pso.session.session import Session
from ds_pso.shards import Engine, Shards, check_precision, find_shards
from ds_pso.shards.engine import cautions, num_stages, ranks_per_sample, tensor_parallel_size
from ds_pso.shards.fragments import trained_numels
from ds_pso.shards.nvme import cautions_of_nvme, swap_folders
from ds_pso.sync.assessment import Probe
from ds_pso.sync.expert_load import ExpertLoad
from ds_pso.sync.health import Limits
from ds_pso.sync.parts import SyncOptions, SyncParts
from ds_pso.sync.schedule import Schedule
from ds_pso.sync.synchronizer import Synchronizer
from ds_pso.utils.offload import Offload

_OF_AN_ENGINE = ("backward", "step", "global_steps", "optimizer", "module", "config", "save_checkpoint")


def check_engine(given: object) -> None:
    """Raise SwarmError unless this is an engine of DeepSpeed."""
    missing = [name for name in _OF_AN_ENGINE if not hasattr(given, name)]
    if not missing:
        return
    remedy = "give it the engine that deepspeed.initialize returned"
    if isinstance(given, tuple | list):
        remedy = "deepspeed.initialize returns four things, of which the first is the engine: give it that one"
    elif hasattr(given, "forward"):
        remedy += ", or that accelerator.prepare returned while Accelerate uses DeepSpeed (accelerate config, or "
        remedy += "Accelerator(deepspeed_plugin=...)); other wrappers and plain modules cannot sync"
    raise SwarmError(
        f"swarm.attach was given a {type(given).__name__}, which is no DeepSpeed engine; {remedy}", agreed=True
    )


def take_filled_in(session: Session, config: object) -> None:
    """Take over the engine's config: Accelerate and the HF Trainer replace each "auto" in a copy of their own.

    Raises:
        ConfigError: particles would write into one another's monitor files.
    """
    if not isinstance(config, Mapping):
        return  # a path
    for name in deepspeed_monitor.OWN_FOLDERS if session.num_particles > 1 else ():
        section = config.get(name) or {}
        if section.get("enabled") and f"particle_{session.particle}" not in str(section):
            raise ConfigError(
                f"{name}: the particles would write into one another's files; give DeepSpeed swarm.ds_config, in "
                "which each has a folder of its own, and not the file itself"
            )
    session.ds_config = {key: value for key, value in config.items() if key != "swarm"}


def check_samples(session: Session, engine: Engine) -> None:
    """Check that the engine has the groups of ranks for which the data were shared out.

    Raises:
        ConfigError: it has not, so that ranks of a group would see different samples, or ranks of two the same.
    """
    wanted, found = parallelism.sequence_parallel_size(session.ds_config), engine.sequence_parallel_size
    if wanted > 1 and found != wanted:
        raise ConfigError(
            f"{parallelism.SEQUENCE} = {wanted}: the engine divides sequences over {found} ranks; give "
            "deepspeed.initialize mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp, after its "
            f"initialize_sequence_parallel({wanted}), or remove the key"
        )
    ranks = session.world.layout.world_size // ranks_per_sample(engine)
    for sampler in session.samplers:
        if sampler.num_ranks != ranks:
            raise ConfigError(
                f"swarm.sampler was made for {sampler.num_ranks} ranks with samples of their own, and the engine has "
                f'{ranks}; write "{parallelism.SEQUENCE}": {found} into the config, or call it after swarm.attach'
            )


def check_swap_folders(session: Session, engine: Any) -> None:
    """Raise ConfigError if the engine swaps to NVMe into a folder that other particles use, too."""
    own = f"particle_{session.particle}"
    for folder in swap_folders(engine) if session.num_particles > 1 else ():
        if own not in folder.parts:
            raise ConfigError(
                f"zero_optimization: the engine swaps into {folder}, and so may other particles; give DeepSpeed, and "
                "deepspeed.zero.Init, swarm.ds_config, in which each has an nvme_path of its own, and not the file "
                "itself"
            )


def build_synchronizer(session: Session, engine: Any, probe: Probe | None) -> Synchronizer | None:
    """Make the synchronizer of an engine; None where there are no sync points.

    Raises:
        UnsupportedError: the engine uses a feature that the swarm cannot follow.
        ConfigError: the config asks for a probe and none is given, or for the length of the training.
    """
    config = session.config
    rule = config.build_rule()
    if rule is None or not session.has_sync_points:
        return None
    schedule = config.build_schedule(session.ds_config)
    _check(session, rule, schedule, probe)
    with session.world.coordinator.agree("attaching the engine"):
        _check_batch(session, engine)
        if rule.keeps_lengths_from is not None and num_stages(engine) > 1:
            raise UnsupportedError(
                f'swarm.{config.sync_mode}.merge = "rda": all ranks of a particle must hold a part of every matrix, '
                'and the stages of a pipeline hold their own; use "mean"'
            )
        if config.moments.rounds and num_stages(engine) > 1:
            raise UnsupportedError(
                f'swarm.moments.wire = "{config.moments.wire}": stages of a pipeline may share a weight, and what is '
                'rounded of its moments depends on where they lie, which is not the same; use "fp32"'
            )
        shards: Shards = find_shards(engine)
        check_precision(shards)
    _check_experts(session, shards)
    if tensor_parallel_size(engine) > 1:
        # The engine may split layers, and ds_pso.init not know.
        keys = session.ds_config | {parallelism.TENSOR: {parallelism.AUTOTP: tensor_parallel_size(engine)}}
        check_consistent(keys, config, "swarm.attach", of=splits_layers)
        by_place = {
            f"fragments = {config.fragments}": config.fragments > 1,
            f'wire = "{config.wire}"': config.wire != UNCOMPRESSED,
            f'moments.wire = "{config.moments.wire}"': config.moments.rounds,
        }
        for key in (key for key, asked in by_place.items() if asked):
            _check_parts(session, shards, key)
    if session.world.is_leader:
        more = [*cautions_of_nvme(engine), *_cautions_of_schedule_free(session, rule, shards)]
        for caution in [*cautions(engine), *more]:
            warnings.warn(f"swarm.attach: {caution}", stacklevel=3)
    rule = rule.inside(type(engine.basic_optimizer).__name__)
    options = SyncOptions(
        probe=probe,
        ranks_by_probe=config.fitness == "probe",
        optimizer_state=config.optimizer_state,
        moments=config.moments,
        wire=config.wire,
        wire_options=config.wire_options,
        residual=config.residual,
        residual_decay=config.residual_decay,
        delay=config.delay,
        fragments=config.fragments,
        streaming=config.streaming,
        mixing=config.mixing,
        offload=Offload(config.state_device, config.state_dtype),
        limits=Limits(config.quarantine_loss, config.quarantine_norm),
        expert_load=_expert_load(engine) if config.expert_load else None,
        section=config.resolved(),
        samples_per_step=engine.train_batch_size if config.particle_weights == "samples" else None,
    )
    parts = SyncParts(session.world, session.exchange, rule, shards, schedule, options)
    return Synchronizer(parts, TrainingProgress(engine, session.samplers))


def _check_batch(session: Session, engine: Any) -> None:
    """Raise ConfigError unless the engine has the batch that ``per_particle`` says: data is shared out by it."""
    for key, value in session.config.per_particle[session.particle] if session.config.per_particle else ():
        found = getattr(engine, key)()
        if found != value:
            raise ConfigError(
                f"{key} = {found}: swarm.per_particle says {value} for particle {session.particle}; give "
                "deepspeed.initialize swarm.ds_config as it is, and other tools the same numbers"
            )


def _expert_load(engine: Any) -> ExpertLoad:
    if num_stages(engine) > 1:
        raise UnsupportedError(
            "swarm.expert_load = true: each stage of a pipeline has routers of its own, and no rank counts for all of "
            "them; set it to false",
            agreed=True,
        )
    load = ExpertLoad(engine.module)
    if not load.sizes:
        raise ConfigError(
            "swarm.expert_load = true: the model has no router whose choices can be counted, which are those of "
            "deepspeed.moe.layer.MoE and of most mixtures of experts in transformers; set it to false"
        )
    return load


def _check_experts(session: Session, shards: Shards) -> None:
    """Raise UnsupportedError unless the ranks of a particle take the same experts of others to be trained."""
    if all(parameter.is_here for parameter in shards.whole):
        return
    mine = zlib.crc32("\n".join(sorted(shards.trained_names())).encode())
    if len({row[0] for row in session.world.local.gather([float(mine)])}) > 1:
        raise UnsupportedError(
            "ds_pso cannot swarm this engine: of one layer some experts are trained and some are not, and not the same "
            "ones on all ranks; train all experts of a layer, or none",
            agreed=True,
        )


def _check_parts(session: Session, shards: Shards, key: str) -> None:
    """Refuse what depends on where a parameter lies, if every rank of a split layer has it at another place."""
    sizes = session.world.coordinator.gather("sizes of the parts of layers", trained_numels(shards))
    if any(other != sizes[0] for other in sizes):
        raise UnsupportedError(
            f"swarm.{key}: layers are split into unequal parts (tensor_parallel.autotp_size), and a parameter that is "
            "not split would be cut or rounded at other places on each rank; leave the key out, or use an autotp_size "
            "that divides heads and widths",
            agreed=True,
        )


def _cautions_of_schedule_free(session: Session, rule: Rule, shards: Shards) -> Iterator[str]:
    """Yield what goes badly with an optimizer whose weights to evaluate are not those that train."""
    if shards.is_schedule_free and rule.model_in != "x":
        yield (
            f"swarm.sync_mode = {session.config.sync_mode!r}: its model is made of the weights that train, and a "
            "schedule-free optimizer evaluates others; use a rule whose model is the mean of the particles"
        )


def _check(session: Session, rule: Rule, schedule: Schedule, probe: Probe | None) -> None:
    config = session.config
    if config.fitness == "probe" and probe is None:
        raise ConfigError('swarm.fitness = "probe": give swarm.attach a probe, or use "train"')
    if rule.uses_probe and probe is None:
        raise ConfigError(
            f'swarm.sync_mode = "{config.sync_mode}": it scores weights on a probe batch; '
            "give swarm.attach a probe, or choose another mode or options"
        )
    if schedule.last == 0 and not config.never_syncs and session.world.is_leader:
        warnings.warn(
            f"swarm.sync_interval = {config.sync_interval}: longer than the whole training, so that "
            "there is no sync point; lower it",
            stacklevel=4,
        )
    if rule.uses_progress and not schedule.last:
        raise ConfigError(
            f"swarm.{config.sync_mode} changes over training, and scheduler.params.total_num_steps = "
            f"{total_num_steps(session.ds_config)!r} gives no sync point; give a number of at least "
            "swarm.sync_interval there or in swarm.total_steps"
        )
