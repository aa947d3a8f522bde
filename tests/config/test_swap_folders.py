"""Particles of a node swap into different folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ds_pso.config.load import load_config
from ds_pso.config.swap_folders import give_each_a_swap_folder
from ds_pso.errors import ConfigError


def config(**sections: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **sections}}


def paths(ds_config: dict[str, Any]) -> list[Any]:
    return [section.get("nvme_path") for name, section in ds_config["zero_optimization"].items() if name != "stage"]


def test_each_particle_has_a_folder() -> None:
    found = config(
        offload_optimizer={"device": "nvme", "nvme_path": "/nvme/"},
        offload_param={"device": "nvme", "nvme_path": Path("/a/b")},
    )
    give_each_a_swap_folder(found, 3)
    assert paths(found) == ["/nvme/particle_3", "/a/b/particle_3"]
    give_each_a_swap_folder(found, 3)  # as where Accelerate was given it already
    assert paths(found) == ["/nvme/particle_3", "/a/b/particle_3"]


@pytest.mark.parametrize(
    "found",
    [
        config(offload_optimizer={"device": "nvme", "nvme_path": "auto"}),
        config(offload_optimizer={"device": "cpu", "nvme_path": "/nvme"}),
        config(offload_param={"device": "cpu"}),
        config(offload_param=None),
        {"zero_optimization": {}},
        {},
    ],
)
def test_others_stay(found: dict[str, Any]) -> None:
    before = copy.deepcopy(found)
    give_each_a_swap_folder(found, 0)
    assert found == before


@pytest.mark.parametrize("path", [None, "", 5])
@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_no_folder_is_an_error(name: str, path: object) -> None:
    given = config(**{name: {"device": "nvme", "nvme_path": path}}) | {"swarm": {"particles": 2}}
    with pytest.raises(ConfigError, match=rf'config: zero_optimization.{name}.device = "nvme": nvme_path = {path!r}; '):
        load_config(given)
