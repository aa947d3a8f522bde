"""What each key of the ``swarm`` section allows, and keys together do not: refused, with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_pso.errors import ConfigError
from ds_pso.rules import Rule

if TYPE_CHECKING:
    from ds_pso.config.schema import SwarmConfig


def total_num_steps(ds_config: Mapping[str, Any]) -> Any:
    """Of DeepSpeed's scheduler; None if it says nothing of the kind, and DeepSpeed will say what is wrong."""
    scheduler = ds_config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, dict) else None
    return params.get("total_num_steps") if isinstance(params, dict) else None


def check_consistent(ds_config: dict[str, Any], swarm: SwarmConfig, where: str) -> None:
    """Refuse what each key allows, and the rule does not."""
    rule, mode = swarm.build_rule(), swarm.sync_mode
    if rule is None:
        return
    if swarm.streaming:
        _check_streaming(swarm, where)
    if swarm.schedule.type != "fixed":
        _check_schedule(rule, swarm, where)
    if rule.uses_progress and swarm.total_steps is None:
        steps = total_num_steps(ds_config)
        if steps is None:
            raise ConfigError(
                f"{where}: swarm.{mode} changes over training, and its length is not known; "
                "set swarm.total_steps, or scheduler.params.total_num_steps"
            )
        if isinstance(steps, int) and swarm.build_schedule(ds_config).last == 0:
            raise ConfigError(
                f"{where}: scheduler.params.total_num_steps = {steps}: no sync point falls in so short a training; "
                "lower swarm.sync_interval"
            )
    if swarm.total_steps is not None and swarm.build_schedule(ds_config).last == 0:
        raise ConfigError(
            f"{where}: swarm.total_steps = {swarm.total_steps}: no sync point falls in so short a training; "
            "lower swarm.sync_interval"
        )
    if swarm.delay > 0:
        _check_delay(rule, swarm, where)
    if not swarm.streaming and swarm.fragments > max(1, swarm.delay):
        raise ConfigError(
            f"{where}: swarm.fragments = {swarm.fragments}: at most one is applied after each step of swarm.delay = "
            f"{swarm.delay}; lower it, or set a longer delay"
        )
    if swarm.wire != "fp32":
        _check_wire(rule, swarm, where)
    if (swarm.state_device, swarm.state_dtype) != ("auto", "fp32"):
        _check_state(rule, swarm, where)
    if swarm.transport == "elastic":
        _check_elastic(rule, swarm, where)
    if rule.max_staleness is not None:
        if swarm.optimizer_state != "keep":
            raise ConfigError(
                f'{where}: swarm.optimizer_state = "{swarm.optimizer_state}": particles that wait for nobody keep '
                f'their own; use "keep", or set swarm.{mode}.asynchronous to false'
            )
        if swarm.fitness == "probe":
            raise ConfigError(
                f'{where}: swarm.fitness = "probe": particles that wait for nobody are not ranked; '
                f'use "train", or set swarm.{mode}.asynchronous to false'
            )


def _check_elastic(rule: Rule, swarm: SwarmConfig, where: str) -> None:
    transport = f'{where}: swarm.transport = "elastic"'
    if swarm.fragments > 1:
        raise ConfigError(
            f"{transport}: a sync point is all or nothing, and swarm.fragments = {swarm.fragments} are applied one "
            "after the other; set it to 1"
        )
    if rule.max_staleness is not None:
        raise ConfigError(
            f"{transport}: particles that may be gone are not written to; set swarm.{swarm.sync_mode}.asynchronous to "
            "false"
        )
    if swarm.peer_backend == "nccl":
        raise ConfigError(f'{transport}: NCCL cannot go on without a peer; set swarm.peer_backend to "gloo" or "auto"')
    if swarm.elastic.straggler == "async" and (rule.state_names or swarm.wire != "fp32"):
        raise ConfigError(
            f'{transport}: swarm.elastic.straggler = "async": with these options swarm.{swarm.sync_mode} or the wire '
            '"' + swarm.wire + '" keeps state that a particle must not have missed; use "skip" or "wait"'
        )


def _check_schedule(rule: Rule, swarm: SwarmConfig, where: str) -> None:
    schedule = swarm.schedule
    if not schedule.min_interval <= swarm.sync_interval <= schedule.max_interval:
        raise ConfigError(
            f"{where}: swarm.sync_interval = {swarm.sync_interval}: the interval begins there, and it must lie between "
            f"swarm.schedule.min_interval = {schedule.min_interval} and max_interval = {schedule.max_interval}"
        )
    if rule.max_staleness is not None:
        raise ConfigError(
            f'{where}: swarm.schedule.type = "{schedule.type}": particles that wait for nobody cannot agree on an '
            f'interval; use "fixed", or set swarm.{swarm.sync_mode}.asynchronous to false'
        )


def _check_streaming(swarm: SwarmConfig, where: str) -> None:
    if swarm.fragments == 1 or swarm.delay == 0:
        raise ConfigError(
            f"{where}: swarm.streaming = true: it spreads at least two fragments over the interval, each applied at "
            f"least one step late, and swarm.fragments = {swarm.fragments}, swarm.delay = {swarm.delay}; raise them, "
            "or remove streaming"
        )
    if swarm.schedule.type != "fixed":
        raise ConfigError(
            f'{where}: swarm.schedule.type = "{swarm.schedule.type}": swarm.streaming divides a fixed interval; use '
            '"fixed", or remove streaming'
        )
    if swarm.sync_interval % swarm.fragments:
        raise ConfigError(
            f"{where}: swarm.sync_interval = {swarm.sync_interval}: swarm.streaming divides it by swarm.fragments = "
            f"{swarm.fragments}, and the rest is not 0; change one of them"
        )
    if swarm.delay > swarm.sync_interval // swarm.fragments:
        raise ConfigError(
            f"{where}: swarm.delay = {swarm.delay}: the next fragment would come first; use at most "
            f"swarm.sync_interval / swarm.fragments = {swarm.sync_interval // swarm.fragments}, or lower fragments"
        )
    if swarm.optimizer_state != "keep":
        raise ConfigError(
            f'{where}: swarm.optimizer_state = "{swarm.optimizer_state}": with swarm.streaming only a part of the '
            'model has met; use "keep", or remove streaming'
        )


def _check_delay(rule: Rule, swarm: SwarmConfig, where: str) -> None:
    key, shortest = "sync_interval", swarm.sync_interval
    if swarm.schedule.type != "fixed":
        key, shortest = "schedule.min_interval", swarm.schedule.min_interval
    if swarm.delay > shortest:
        raise ConfigError(
            f"{where}: swarm.delay = {swarm.delay}: the next sync point would come first; use at most "
            f"swarm.{key} = {shortest}, or raise that"
        )
    if rule.uses_probe:
        raise ConfigError(
            f"{where}: swarm.delay = {swarm.delay}: with these options swarm.{swarm.sync_mode} scores weights on a "
            "probe batch before it settles, and training would have to wait; use 0"
        )
    if rule.compares_rates:
        raise ConfigError(
            f"{where}: swarm.delay = {swarm.delay}: swarm.{swarm.sync_mode} compares learning rates, and they would "
            f"change in the middle of an interval; set swarm.{swarm.sync_mode}.lr_spread to 1, or use 0"
        )
    if rule.max_staleness is not None:
        raise ConfigError(
            f"{where}: swarm.delay = {swarm.delay}: particles that wait for nobody have nothing to hide; use 0, or set "
            f"swarm.{swarm.sync_mode}.asynchronous to false"
        )
    if swarm.optimizer_state == "average":
        raise ConfigError(
            f'{where}: swarm.optimizer_state = "average": moments cannot be corrected for the steps of swarm.delay = '
            f'{swarm.delay}; use "keep" or "reset", or a delay of 0'
        )


def _check_wire(rule: Rule, swarm: SwarmConfig, where: str) -> None:
    if not rule.receives_alike:
        raise ConfigError(
            f'{where}: swarm.wire = "{swarm.wire}": with these options of swarm.{swarm.sync_mode} each particle '
            'receives something else, and only what all receive can be sent as a difference; use "fp32"'
        )
    if swarm.optimizer_state == "average":
        raise ConfigError(
            f'{where}: swarm.wire = "{swarm.wire}": with swarm.optimizer_state = "average" the moments would travel in '
            'fp32, and be more than what was saved; use "keep" or "reset"'
        )


def _check_state(rule: Rule, swarm: SwarmConfig, where: str) -> None:
    kept = rule.state_names
    if swarm.state_device != "auto" and not kept and swarm.wire == "fp32":
        raise ConfigError(
            f'{where}: swarm.state_device = "{swarm.state_device}": with these options swarm.{swarm.sync_mode} keeps '
            'no state, nor does the wire "fp32"; remove the key'
        )
    if swarm.state_dtype != "fp32" and not kept & rule.rough_state and swarm.wire == "fp32":
        raise ConfigError(
            f'{where}: swarm.state_dtype = "{swarm.state_dtype}": with these options swarm.{swarm.sync_mode} keeps no '
            'state that may be rounded, nor does the wire "fp32"; remove the key'
        )
