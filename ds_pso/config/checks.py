"""Keys of the ``swarm`` section that exclude each other: a table, and the loop that refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_pso.comm.compression import UNCOMPRESSED, is_partial
from ds_pso.config import parallelism
from ds_pso.config.schema import SwarmConfig, total_num_steps
from ds_pso.errors import ConfigError
from ds_pso.rules import Rule
from ds_pso.sync.moment_options import ALL_AT_EACH_SYNC


@dataclass(frozen=True)
class Combination:
    """A config whose keys are each valid by themselves.

    Attributes:
        swarm: the section.
        rule: the rule that it names.
        ds_config: DeepSpeed's part.
    """

    swarm: SwarmConfig
    rule: Rule
    ds_config: Mapping[str, object]

    @property
    def steps(self) -> object:
        """Length of the training as DeepSpeed's scheduler has it."""
        return total_num_steps(self.ds_config)

    @property
    def has_no_sync_point(self) -> bool:
        """True if the length of the training is known, and too short for a sync point."""
        return self.swarm.build_schedule(self.ds_config).last == 0

    @property
    def fragment_interval(self) -> int:
        """Optimizer steps between the fragments of a streaming sync."""
        return self.swarm.sync_interval // self.swarm.fragments

    @property
    def shortest_interval(self) -> int:
        """Fewest optimizer steps between two sync points."""
        return self.swarm.schedule.min_interval if varies(self) else self.swarm.sync_interval

    @property
    def shortest_key(self) -> str:
        """The key that sets ``shortest_interval``."""
        return "schedule.min_interval" if varies(self) else "sync_interval"

    @property
    def unknown_batch(self) -> str | None:
        """The key by which the batch of some particle is not known; None: it is known of each."""
        for entry in self.swarm.per_particle:
            for key, value in entry:
                given = self.ds_config.get(key, _BATCH_DEFAULTS.get(key))
                if value is None and (not isinstance(given, int) or given < 1):
                    return str(key)
        return None


_BATCH_DEFAULTS = {"gradient_accumulation_steps": 1}  # of DeepSpeed
_ELEMENT_BY_ELEMENT = (UNCOMPRESSED, "bf16")  # the wires that round each element by itself
Predicate = Callable[[Combination], bool]


@dataclass(frozen=True)
class Exclusion:
    """A row of the table: a feature, and what it excludes.

    Attributes:
        feature: true if the feature is used.
        excludes: true if the config also has what does not go with it; asked only where ``feature`` is true.
        reason: names the key and why it cannot be; ``{swarm...}`` and ``{config...}`` are filled in.
        remedy: the change to make, likewise; empty where the reason implies it.
    """

    feature: Predicate
    excludes: Predicate
    reason: str
    remedy: str = ""

    @property
    def message(self) -> str:
        """The error, with its gaps."""
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


# -- features -------------------------------------------------------------------------------


def streams(c: Combination) -> bool:
    return c.swarm.streaming


def varies(c: Combination) -> bool:
    return c.swarm.schedule.type != "fixed"


def follows_progress(c: Combination) -> bool:
    return c.rule.uses_progress and c.swarm.total_steps is None


def has_total_steps(c: Combination) -> bool:
    return c.swarm.total_steps is not None


def delays(c: Combination) -> bool:
    return c.swarm.delay > 0


def cuts(c: Combination) -> bool:
    return c.swarm.fragments > 1 and not c.swarm.streaming


def compresses(c: Combination) -> bool:
    return c.swarm.wire != UNCOMPRESSED


def sends_a_part(c: Combination) -> bool:
    return is_partial(c.swarm.wire)


def leaves_residual_in_weights(c: Combination) -> bool:
    return c.swarm.residual == "weights"


def settles_on_one_mean(c: Combination) -> bool:
    """True of a rule after which all particles are where the mean of their weights put them, tried by no score."""
    return c.rule.ends_equal and c.rule.receives_the_mean and not c.rule.uses_probe


def measures_matrices(c: Combination) -> bool:
    return c.rule.keeps_lengths_from is not None


def places_state(c: Combination) -> bool:
    return c.swarm.state_device != "auto"


def rounds_state(c: Combination) -> bool:
    return c.swarm.state_dtype != "fp32"


def has_unequal_batches(c: Combination) -> bool:
    return bool(c.swarm.per_particle)


def is_elastic(c: Combination) -> bool:
    return c.swarm.transport == "elastic"


def is_asynchronous(c: Combination) -> bool:
    return c.rule.max_staleness is not None


def averages_moments(c: Combination) -> bool:
    return c.swarm.optimizer_state == "average"


def treats_moments(c: Combination) -> bool:
    """True if the config says when moments are averaged, or how they travel."""
    return c.swarm.moments != ALL_AT_EACH_SYNC


def rounds_moments(c: Combination) -> bool:
    return averages_moments(c) and c.swarm.moments.rounds


def never_syncs(c: Combination) -> bool:
    return c.swarm.never_syncs


def divides_sequences(c: Combination) -> bool:
    return parallelism.sequence_parallel_size(c.ds_config) > 1


def splits_layers(c: Combination) -> bool:
    return parallelism.tensor_parallel_size(c.ds_config) > 1


# -- the table, in the order in which rows are tried ------------------------------------------

EXCLUSIONS: list[Exclusion] = [
    Exclusion(
        has_unequal_batches,
        lambda c: isinstance(c.ds_config.get("train_batch_size"), int),
        "train_batch_size = {config.ds_config[train_batch_size]}: with swarm.per_particle each particle has a batch of "
        "its own",
        "remove it",
    ),
    Exclusion(
        has_unequal_batches,
        lambda c: c.unknown_batch is not None,
        'swarm.per_particle: data is shared out by the batches of all particles, and "{config.unknown_batch}" is no '
        "number of at least 1 for some",
        "give it in each entry, or once beside swarm",
    ),
    Exclusion(
        has_unequal_batches,
        is_elastic,
        'swarm.transport = "elastic": a particle that recovers takes over the place of another in the data, and with '
        "swarm.per_particle that is counted in batches of another size",
        'use "static", or remove per_particle',
    ),
    Exclusion(
        streams,
        lambda c: c.swarm.fragments == 1 or not delays(c),
        "swarm.streaming = true: it spreads at least two fragments over the interval, each applied at least one step "
        "late, and swarm.fragments = {swarm.fragments}, swarm.delay = {swarm.delay}",
        "raise them, or remove streaming",
    ),
    Exclusion(
        streams,
        varies,
        'swarm.schedule.type = "{swarm.schedule.type}": swarm.streaming divides a fixed interval',
        'use "fixed", or remove streaming',
    ),
    Exclusion(
        streams,
        lambda c: c.swarm.sync_interval % c.swarm.fragments != 0,
        "swarm.sync_interval = {swarm.sync_interval}: swarm.streaming divides it by swarm.fragments = "
        "{swarm.fragments}, and the rest is not 0",
        "change one of them",
    ),
    Exclusion(
        streams,
        lambda c: c.swarm.delay > c.fragment_interval,
        "swarm.delay = {swarm.delay}: the next fragment would come first",
        "use at most swarm.sync_interval / swarm.fragments = {config.fragment_interval}, or lower fragments",
    ),
    Exclusion(
        streams,
        lambda c: c.swarm.optimizer_state != "keep",
        'swarm.optimizer_state = "{swarm.optimizer_state}": with swarm.streaming only a part of the model was synced',
        'use "keep", or remove streaming',
    ),
    Exclusion(
        never_syncs,
        varies,
        'swarm.sync_interval = "never": swarm.schedule.type = "{swarm.schedule.type}" has nothing to vary',
        "set a number, or remove the schedule",
    ),
    Exclusion(
        never_syncs,
        delays,
        'swarm.sync_interval = "never": swarm.delay = {swarm.delay}, and there is nothing to come late',
        "set a number, or remove the delay",
    ),
    Exclusion(
        never_syncs,
        lambda c: c.rule.uses_progress,
        'swarm.sync_interval = "never": with these options swarm.{swarm.sync_mode} changes from one sync point to the '
        "next",
        'set a number, or use the sync_mode "local_sgd"',
    ),
    Exclusion(
        varies,
        lambda c: not c.swarm.schedule.min_interval <= c.swarm.sync_interval <= c.swarm.schedule.max_interval,
        "swarm.sync_interval = {swarm.sync_interval}: the interval begins there, and it must lie between "
        "swarm.schedule.min_interval = {swarm.schedule.min_interval} and max_interval = {swarm.schedule.max_interval}",
    ),
    Exclusion(
        varies,
        is_asynchronous,
        'swarm.schedule.type = "{swarm.schedule.type}": particles that wait for nobody cannot agree on an interval',
        'use "fixed", or set swarm.{swarm.sync_mode}.asynchronous to false',
    ),
    Exclusion(
        follows_progress,
        lambda c: c.steps is None,
        "swarm.{swarm.sync_mode} changes over training, and its length is not known",
        "set swarm.total_steps, or scheduler.params.total_num_steps",
    ),
    Exclusion(
        follows_progress,
        lambda c: isinstance(c.steps, int) and c.has_no_sync_point,
        "scheduler.params.total_num_steps = {config.steps}: no sync point falls in so short a training",
        "lower swarm.sync_interval",
    ),
    Exclusion(
        has_total_steps,
        lambda c: c.has_no_sync_point and not never_syncs(c),
        "swarm.total_steps = {swarm.total_steps}: no sync point falls in so short a training",
        "lower swarm.sync_interval",
    ),
    Exclusion(
        lambda c: c.swarm.mixing > 0,
        lambda c: not delays(c),
        "swarm.mixing = {swarm.mixing}: only what comes late is mixed",
        "set swarm.delay, or remove the key",
    ),
    Exclusion(
        delays,
        lambda c: c.swarm.delay > c.shortest_interval,
        "swarm.delay = {swarm.delay}: the next sync point would come first",
        "use at most swarm.{config.shortest_key} = {config.shortest_interval}, or raise that",
    ),
    Exclusion(
        delays,
        lambda c: c.rule.uses_probe,
        "swarm.delay = {swarm.delay}: with these options swarm.{swarm.sync_mode} scores weights on a probe batch "
        "before it settles, and training would have to wait",
        "use 0",
    ),
    Exclusion(
        delays,
        lambda c: c.rule.compares_rates,
        "swarm.delay = {swarm.delay}: swarm.{swarm.sync_mode} compares learning rates, and they would change in the "
        "middle of an interval",
        "set swarm.{swarm.sync_mode}.lr_spread to 1, or use 0",
    ),
    Exclusion(
        delays,
        is_asynchronous,
        "swarm.delay = {swarm.delay}: particles that wait for nobody have nothing to hide",
        "use 0, or set swarm.{swarm.sync_mode}.asynchronous to false",
    ),
    Exclusion(
        delays,
        measures_matrices,
        'swarm.delay = {swarm.delay}: swarm.{swarm.sync_mode}.merge = "rda" measures whole matrices, and the ranks of '
        "a particle that hold their parts are busy training",
        'use "mean", or a delay of 0',
    ),
    Exclusion(
        cuts,
        lambda c: c.swarm.fragments > c.swarm.delay,
        "swarm.fragments = {swarm.fragments}: at most one is applied after each step of swarm.delay = {swarm.delay}",
        "lower it, or set a longer delay",
    ),
    Exclusion(
        compresses,
        lambda c: not c.rule.receives_alike,
        'swarm.wire = "{swarm.wire}": with these options of swarm.{swarm.sync_mode} each particle receives something '
        "else, and only what all receive can be sent as a difference",
        'use "fp32"',
    ),
    Exclusion(
        compresses,
        lambda c: averages_moments(c) and not rounds_moments(c),
        'swarm.wire = "{swarm.wire}": with swarm.optimizer_state = "average" the moments would travel in fp32, and be '
        "more than what was saved",
        'set swarm.moments.wire, or use "keep" or "reset"',
    ),
    Exclusion(
        treats_moments,
        lambda c: not averages_moments(c),
        'swarm.moments: with swarm.optimizer_state = "{swarm.optimizer_state}" no moments travel',
        'remove it, or use "average"',
    ),
    Exclusion(
        sends_a_part,
        lambda c: not settles_on_one_mean(c),
        'swarm.wire = "{swarm.wire}": what it withholds reaches the others later, and with these options '
        "swarm.{swarm.sync_mode} goes on from something else than the mean of all that was sent",
        'use "int4", or the sync_mode "local_sgd" or "diloco"',
    ),
    Exclusion(
        sends_a_part,
        measures_matrices,
        'swarm.wire = "{swarm.wire}": swarm.{swarm.sync_mode}.merge = "rda" stretches what arrives to the length of '
        "whole movements, and only a part of each arrives",
        'use "int4", or the merge "mean"',
    ),
    Exclusion(
        sends_a_part,
        lambda c: c.swarm.mixing > 0 and not leaves_residual_in_weights(c),
        'swarm.wire = "{swarm.wire}": what it withholds waits in the wire, and with swarm.mixing = {swarm.mixing} the '
        "particle keeps a part of it, too, so that more would be sent in the end than it has moved",
        'set swarm.residual to "weights", or remove mixing',
    ),
    Exclusion(
        leaves_residual_in_weights,
        lambda c: not compresses(c),
        'swarm.residual = "weights": the wire "fp32" withholds nothing',
        "remove the key, or set swarm.wire",
    ),
    Exclusion(
        leaves_residual_in_weights,
        lambda c: not settles_on_one_mean(c),
        'swarm.residual = "weights": with these options swarm.{swarm.sync_mode} does not end with the same weights on '
        "all particles, to which a residual could be added",
        'use "wire", or the sync_mode "local_sgd" or "diloco"',
    ),
    Exclusion(
        leaves_residual_in_weights,
        measures_matrices,
        'swarm.residual = "weights": swarm.{swarm.sync_mode}.merge = "rda" changes how far each particle has moved '
        "before it sends that, and what it did not send would be no part of its own movement",
        'use "wire", or the merge "mean"',
    ),
    Exclusion(
        lambda c: c.swarm.residual_decay < 1,
        lambda c: not compresses(c) or leaves_residual_in_weights(c),
        "swarm.residual_decay = {swarm.residual_decay}: there is no residual in the wire",
        'remove the key, or set swarm.wire, and swarm.residual to "wire"',
    ),
    Exclusion(
        places_state,
        lambda c: not c.rule.state_names and not compresses(c) and not rounds_moments(c),
        'swarm.state_device = "{swarm.state_device}": with these options swarm.{swarm.sync_mode} keeps no state, nor '
        'does the wire "fp32"',
        "remove the key",
    ),
    Exclusion(
        rounds_state,
        lambda c: not c.rule.state_names & c.rule.rough_state and not compresses(c) and not rounds_moments(c),
        'swarm.state_dtype = "{swarm.state_dtype}": with these options swarm.{swarm.sync_mode} keeps no state that '
        'may be rounded, nor does the wire "fp32"',
        "remove the key",
    ),
    Exclusion(
        is_elastic,
        lambda c: c.swarm.fragments > 1,
        'swarm.transport = "elastic": a sync point is all or nothing, and swarm.fragments = {swarm.fragments} are '
        "applied one after the other",
        "set it to 1",
    ),
    Exclusion(
        is_elastic,
        is_asynchronous,
        'swarm.transport = "elastic": particles that may be gone are not written to',
        "set swarm.{swarm.sync_mode}.asynchronous to false",
    ),
    Exclusion(
        is_elastic,
        lambda c: c.swarm.peer_backend == "nccl",
        'swarm.transport = "elastic": NCCL cannot go on without a peer',
        'set swarm.peer_backend to "gloo" or "auto"',
    ),
    Exclusion(
        is_elastic,
        lambda c: c.swarm.elastic.straggler == "async" and (bool(c.rule.state_names) or compresses(c)),
        'swarm.transport = "elastic": swarm.elastic.straggler = "async": with these options swarm.{swarm.sync_mode} or '
        'the wire "{swarm.wire}" keeps state that a particle must not have missed',
        'use "skip" or "wait"',
    ),
    Exclusion(
        is_asynchronous,
        lambda c: c.swarm.optimizer_state != "keep",
        'swarm.optimizer_state = "{swarm.optimizer_state}": particles that wait for nobody keep their own',
        'use "keep", or set swarm.{swarm.sync_mode}.asynchronous to false',
    ),
    Exclusion(
        is_asynchronous,
        lambda c: c.swarm.fitness == "probe",
        'swarm.fitness = "probe": particles that wait for nobody are not ranked',
        'use "train", or set swarm.{swarm.sync_mode}.asynchronous to false',
    ),
    Exclusion(
        divides_sequences,
        lambda c: parallelism.MESH in c.ds_config,
        "data_parallel_size = {config.ds_config[data_parallel_size]}: with sequence_parallel_size DeepSpeed makes a "
        "mesh of the two, and does not reduce gradients over the ranks of a sequence, whose weights would drift apart",
        "remove it, and give deepspeed.initialize mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp",
    ),
    Exclusion(
        splits_layers,
        divides_sequences,
        "tensor_parallel.autotp_size = {config.ds_config[tensor_parallel][autotp_size]}: the layers of a particle are "
        "split, or its sequences, and sequence_parallel_size = {config.ds_config[sequence_parallel_size]}",
        "remove one of them",
    ),
    Exclusion(
        splits_layers,
        lambda c: c.swarm.wire not in _ELEMENT_BY_ELEMENT,
        'swarm.wire = "{swarm.wire}": with tensor_parallel.autotp_size some parameters are the same on several ranks, '
        "and this wire rounds an element by what lies beside it, which is not the same",
        'use "fp32" or "bf16"',
    ),
    Exclusion(
        splits_layers,
        lambda c: averages_moments(c) and c.swarm.moments.wire not in _ELEMENT_BY_ELEMENT,
        'swarm.moments.wire = "{swarm.moments.wire}": with tensor_parallel.autotp_size some parameters are the same on '
        "several ranks, and this wire rounds an element by what lies beside it, which is not the same",
        'use "fp32" or "bf16"',
    ),
]


def check_consistent(
    ds_config: Mapping[str, object], swarm: SwarmConfig, where: str, *, of: Predicate | None = None
) -> None:
    """Refuse a section whose keys exclude each other.

    Args:
        where: begins the error, such as the path of the file.
        of: the feature whose rows of the table are tried; None: all are.

    Raises:
        ConfigError: names the first row of the table that applies.
    """
    rule = swarm.build_rule()
    if rule is None:
        return
    config = Combination(swarm, rule, ds_config)
    for row in EXCLUSIONS:
        if of in (None, row.feature) and row.feature(config) and row.excludes(config):
            raise ConfigError(f"{where}: {row.message.format(swarm=swarm, config=config)}")
