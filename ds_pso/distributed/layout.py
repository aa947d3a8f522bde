"""Who is who: ranks, particles and peer groups, from the launcher's environment. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ds_pso.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """A rank's place among W = P x S ranks; the ranks of a particle follow each other.

    Attributes:
        rank: in the launcher's world.
        world_size: W.
        num_particles: P.
    """

    rank: int
    world_size: int
    num_particles: int

    @property
    def particle_size(self) -> int:
        """S, the number of ranks in a particle."""
        return self.world_size // self.num_particles

    @property
    def particle(self) -> int:
        """The number of this rank's particle."""
        return self.rank // self.particle_size

    @property
    def shard_rank(self) -> int:
        """Rank inside the particle, which is also the number of the ZeRO shard."""
        return self.rank % self.particle_size

    @cached_property
    def peers(self) -> list[int]:
        """Launcher's ranks of this rank's peer group, in the order of particles."""
        return [p * self.particle_size + self.shard_rank for p in range(self.num_particles)]

    @cached_property
    def local_ranks(self) -> list[int]:
        """Launcher's ranks of this rank's particle."""
        first = self.particle * self.particle_size
        return list(range(first, first + self.particle_size))

    def particle_folder(self, folder: Path) -> Path:
        """Return the folder in ``folder`` that is this particle's alone."""
        own = f"particle_{self.particle}"
        return folder if own in folder.parts else folder / own


def read_layout(particles: int | Literal["node"], env: Mapping[str, str]) -> Layout:
    """Read the launcher's environment, before anything is built.

    Raises:
        ConfigError: P does not divide W, or the environment is incomplete.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        for name in _names_of_task_counts(env):
            if read_int(env, name, 1) > 1:
                raise ConfigError(
                    f"{name} = {env[name]}, but RANK and WORLD_SIZE are not set; start with deepspeed, torchrun or "
                    "accelerate launch, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each task; "
                    f"if this is the only process, unset {name}"
                )
        rank, world_size = 0, 1  # started as plain `python script.py`
    else:
        rank, world_size = read_int(env, "RANK"), read_int(env, "WORLD_SIZE")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise ConfigError(f"{name} is not set; start with deepspeed, torchrun or accelerate launch")
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK = {rank}: must lie between 0 and WORLD_SIZE - 1 = {world_size - 1}")
    if particles == "node":
        # torchrun and accelerate set the first name, the deepspeed launcher the second.
        name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env or "LOCAL_SIZE" not in env else "LOCAL_SIZE"
        local = read_int(env, name, 1 if world_size == 1 else None)
        if local < 1 or world_size % local:
            raise ConfigError(
                f'swarm.particles = "node": {world_size} ranks do not split into nodes of {local}; '
                "start the same number of ranks on every node, or give the number of particles"
            )
        return Layout(rank, world_size, world_size // local)
    if world_size % particles:
        divisors = [str(p) for p in range(1, world_size + 1) if world_size % p == 0]
        raise ConfigError(
            f"swarm.particles = {particles}: does not divide the {world_size} ranks that were started; "
            f"use one of {', '.join(divisors)}, or start another number of ranks"
        )
    return Layout(rank, world_size, particles)


def _names_of_task_counts(env: Mapping[str, str]) -> list[str]:
    """Names under which MPI and Slurm tell a task how many there are."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
    # Of the job, and in a batch script, too; srun's own number of tasks in this step goes before it.
    return names if "SLURM_STEP_NUM_TASKS" in env else [*names, "SLURM_NTASKS", "SLURM_NPROCS"]


def read_int(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number from the launcher's environment; ConfigError if it is none or, without default, missing."""
    value = env.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"{name} is not set; start with deepspeed, torchrun or accelerate launch")
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{name} = {value!r}: must be a whole number; the launcher sets it") from error
