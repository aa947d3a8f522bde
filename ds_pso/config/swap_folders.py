"""The folders for what DeepSpeed swaps to NVMe: it numbers ranks from 0 in each particle, so each needs its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from ds_pso.errors import ConfigError


def check_nvme_paths(ds_config: Mapping[str, object], where: str) -> None:
    """Raise ConfigError where NVMe is asked for and no folder is given.

    Args:
        ds_config: DeepSpeed's part of the config.
        where: how messages call it.
    """
    for name, section in _on_nvme(ds_config):
        path = section.get("nvme_path")
        if not isinstance(path, str | PurePath) or not str(path):
            raise ConfigError(
                f'{where}: zero_optimization.{name}.device = "nvme": nvme_path = {path!r}; give it a folder on the '
                "NVMe disk of each node"
            )


def give_each_a_swap_folder(ds_config: Mapping[str, object], particle: int) -> None:
    """Let the particles of a node swap into different folders, ``particle_<i>`` in ``nvme_path``.

    Args:
        ds_config: DeepSpeed's part of the config, which is changed.
        particle: the number of this one.
    """
    own = f"particle_{particle}"
    for _, section in _on_nvme(ds_config):
        path = section["nvme_path"]
        # "auto" is filled in by Accelerate, and attach looks at what came of it.
        if path != "auto" and PurePath(path).name != own:
            section["nvme_path"] = str(PurePath(path) / own)


def _on_nvme(ds_config: Mapping[str, object]) -> Iterator[tuple[str, dict[str, Any]]]:
    zero = ds_config.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(section, dict) and section.get("device") == "nvme":
            yield name, section
