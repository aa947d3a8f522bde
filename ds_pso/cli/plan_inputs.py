"""The input of ``ds-pso plan``: a config, ranks, and the time of a step."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_pso.cli.arguments import check_above_zero, check_at_least
from ds_pso.cli.gpus import step_seconds
from ds_pso.cli.model_size import count_parameters
from ds_pso.errors import ConfigError
from ds_pso.utils.units import as_count

if TYPE_CHECKING:
    from ds_pso.config.schema import SwarmConfig

DEFAULT_PARTICLES = 2


@dataclass(frozen=True)
class Given:
    """The config that is planned for.

    Attributes:
        ds_config: DeepSpeed's part.
        section: the ``swarm`` section as it was written; without one the number of particles alone.
        swarm: the same, checked.
        particles: P.
        has_section: false where the section is not the user's.
    """

    ds_config: dict[str, Any]
    section: dict[str, Any]
    swarm: SwarmConfig
    particles: int
    has_section: bool


@dataclass(frozen=True)
class Step:
    """An optimizer step of a particle.

    Attributes:
        parameters: trained parameters, M.
        seconds: its time.
        source: where the time is from.
        backend: of DeepSpeed's collectives, ``nccl`` or ``gloo``.
    """

    parameters: float
    seconds: float
    source: str
    backend: str


def read_config_of(arguments: argparse.Namespace) -> Given:
    """Read the config, or take the one built into ``train.py``."""
    from ds_pso.config.load import load_config, read_config
    from ds_pso.training.arguments import built_in_config

    if arguments.config is None:
        config = built_in_config() | ({"bf16": {"enabled": True}} if arguments.gpus else {})
        section = None
    else:
        config = read_config(arguments.config)
        section = config.get("swarm")
    if section is not None:
        ds_config, swarm = load_config(arguments.config)
        _check_section(arguments.config, ds_config, swarm)
        particles = _particles(arguments, swarm)
        kept = section if swarm.particles == "node" else section | {"particles": particles}
        return Given(ds_config, kept, swarm, particles, has_section=True)
    particles = DEFAULT_PARTICLES if arguments.particles is None else arguments.particles
    check_at_least(particles=(particles, 2))
    section = {"particles": particles}
    ds_config, swarm = load_config(config | {"swarm": section})
    return Given(ds_config, section, swarm, particles, has_section=False)


def _check_section(path: str, ds_config: Mapping[str, object], swarm: SwarmConfig) -> None:
    from ds_pso.config.cost_model import moments_kept
    from ds_pso.config.load import name_of

    if swarm.optimizer_state == "average" and moments_kept(ds_config) is None:
        raise ConfigError(
            f'{name_of(path)}: swarm.optimizer_state = "average": how many moments travel depends on the optimizer; '
            'name it in the config, or plan with "keep"'
        )


def _particles(arguments: argparse.Namespace, swarm: SwarmConfig) -> int:
    particles = swarm.particles if arguments.particles is None else arguments.particles
    if particles == "node":
        raise ConfigError('swarm.particles = "node": how many there will be is not known here; give --particles')
    if particles == 1:
        from ds_pso.config.load import name_of

        raise ConfigError(
            f"{name_of(arguments.config)}: with one particle nothing crosses a link, so there is nothing to plan; give "
            "more with --particles, or ask ds-pso check for the memory"
        )
    check_at_least(particles=(particles, 2))
    return int(particles)


def ranks_of(arguments: argparse.Namespace) -> int:
    """Return the ranks of a particle: as given, or one for each of its GPUs."""
    number = arguments.gpus.number if arguments.gpus else None
    if arguments.ranks is None:
        return number or 1
    if number is not None and arguments.ranks != number:
        raise ConfigError(f"--ranks = {arguments.ranks}: --gpus has {number} of them; leave --ranks out")
    check_at_least(ranks=(arguments.ranks, 1))
    return int(arguments.ranks)


def step_of(arguments: argparse.Namespace, given: Given, ranks: int) -> Step:
    """Count the parameters, and take, compute or measure the time of a step."""
    if arguments.tokens is None and arguments.step_seconds is None:
        name = "measure" if arguments.measure else "gpus"
        raise ConfigError(f"--{name}: how many tokens a step has is not known; add --tokens")
    if arguments.tokens is not None:
        check_at_least(tokens=(arguments.tokens, ranks))
    if arguments.measure:
        return _measured(arguments, given.ds_config, ranks)
    parameters = arguments.parameters if arguments.model is None else count_parameters(arguments.model)
    check_at_least(parameters=(parameters, 1))
    if arguments.gpus is None:
        check_above_zero(step_seconds=arguments.step_seconds)
        backend = "gloo" if given.swarm.peer_backend == "gloo" else "nccl"
        return Step(parameters, arguments.step_seconds, "as given", backend)
    seconds = step_seconds(parameters, arguments.tokens, arguments.gpus, arguments.mfu)
    peak = arguments.gpus.peak_flops / arguments.gpus.number / 1e12
    source = (
        f"6 x {as_count(parameters)} x {arguments.tokens:,.0f} tokens at {100 * arguments.mfu:g} % of "
        f"{arguments.gpus.number} x {peak:g} TFLOP/s"
    )
    return Step(parameters, seconds, source, "nccl")


def _measured(arguments: argparse.Namespace, ds_config: Mapping[str, object], ranks: int) -> Step:
    if arguments.model is None:
        raise ConfigError("--measure: there is no model to train; give --model instead of --parameters")
    from ds_pso.training.step_time import measure_step

    tokens = round(arguments.tokens / ranks)
    found = measure_step(arguments.model, ds_config, tokens)
    source = f"measured with {tokens} tokens on one rank, {found.device}"
    return Step(found.parameters, found.seconds, source, found.backend)
