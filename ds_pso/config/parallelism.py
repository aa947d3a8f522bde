"""Sequence and tensor parallelism inside a particle, as DeepSpeed's part of the config asks for them."""

from __future__ import annotations

from collections.abc import Mapping

from ds_pso.errors import ConfigError

SEQUENCE = "sequence_parallel_size"
MESH = "data_parallel_size"  # beside SEQUENCE: DeepSpeed makes a mesh of the two
TENSOR = "tensor_parallel"
AUTOTP = "autotp_size"


def sequence_parallel_size(ds_config: Mapping[str, object]) -> int:
    """Return the number of ranks that have a part of each sequence; 1: a rank has whole sequences.

    Raises:
        ConfigError: it is no number of ranks.
    """
    return _read_size(SEQUENCE, ds_config.get(SEQUENCE, 1), least=1)


def tensor_parallel_size(ds_config: Mapping[str, object]) -> int:
    """Return the number of ranks over which DeepSpeed's AutoTP splits each layer; 1: none is split.

    Raises:
        ConfigError: it is no number of ranks.
    """
    section = ds_config.get(TENSOR)
    if not isinstance(section, Mapping):
        return 1
    return max(1, _read_size(f"{TENSOR}.{AUTOTP}", section.get(AUTOTP, 0), least=0))


def ranks_per_sample(ds_config: Mapping[str, object]) -> int:
    """Return the number of ranks of a particle that compute on the same samples together."""
    return sequence_parallel_size(ds_config) * tensor_parallel_size(ds_config)


def check_divides(ds_config: Mapping[str, object], particle_size: int) -> None:
    """Refuse groups of ranks into which the S ranks of a particle cannot be divided.

    Raises:
        ConfigError: names the key.
    """
    keys = {
        SEQUENCE: sequence_parallel_size(ds_config),
        f"{TENSOR}.{AUTOTP}": tensor_parallel_size(ds_config),
    }
    for key, size in keys.items():
        if particle_size % size:
            raise ConfigError(
                f"{key} = {size}: does not divide the {particle_size} ranks of a particle; use a divisor of that, or "
                "start another number of ranks"
            )


def _read_size(key: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key} = {value!r}: must be a whole number of at least {least}, of ranks of a particle")
    return value
