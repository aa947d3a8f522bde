"""The environment variables by which ``ds-pso launch`` says where a process stands in an elastic swarm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ds_pso.distributed.layout import Layout, read_int
from ds_pso.errors import ConfigError

PREFIX = "DS_PSO_"
LIGHTHOUSE, PARTICLE, PARTICLES, START, LAUNCHER, ATTEMPT, HOST = (
    PREFIX + name for name in ("LIGHTHOUSE", "PARTICLE", "PARTICLES", "START", "LAUNCHER", "ATTEMPT", "HOST")
)


@dataclass(frozen=True)
class Launch:
    """The launcher's word to a rank.

    Attributes:
        lighthouse: URL.
        layout: of all P particles, whether they are there or not.
        start: how many particles a new swarm waits for before it begins.
        launcher: its name, which no other has; empty: something else has set the variables.
        attempt: how often it has started this particle before.
        host: address of this machine, on the network that joins the particles.
    """

    lighthouse: str
    layout: Layout
    start: int
    launcher: str
    attempt: int
    host: str


def is_launched(env: Mapping[str, str]) -> bool:
    """True if ``ds-pso launch`` has started this process."""
    return LIGHTHOUSE in env


def read_launch(particles: int | Literal["node"], env: Mapping[str, str]) -> Launch:
    """Read the environment, before anything is built.

    Args:
        particles: what the config says.

    Raises:
        ConfigError: started by another launcher, or the numbers do not fit.
    """
    if not is_launched(env):
        raise ConfigError(
            'swarm.transport = "elastic": each particle must be a job of its own; start with ds-pso launch, or use '
            '"static"'
        )
    places, particle = read_int(env, PARTICLES), read_int(env, PARTICLE)
    if particles not in ("node", places):
        raise ConfigError(
            f'swarm.particles = {particles}: ds-pso launch was given --particles {places}; use one number, or "node"'
        )
    if not 0 <= particle < places:
        raise ConfigError(f"{PARTICLE} = {particle}: must lie between 0 and {PARTICLES} - 1 = {places - 1}")
    rank, size = read_int(env, "RANK", 0), read_int(env, "WORLD_SIZE", 1)
    return Launch(
        env[LIGHTHOUSE],
        Layout(particle * size + rank, places * size, places),
        read_int(env, START, places),
        env.get(LAUNCHER, ""),
        read_int(env, ATTEMPT, 0),
        env.get(HOST, "127.0.0.1"),
    )
