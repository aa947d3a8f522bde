"""In an elastic swarm each particle exports its own model, beside those of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from integration.jobs import Case, Weights, assert_equal, swarm_of, train, working_weights
from pool import Pool
from safetensors.torch import load_file

from ds_pso.errors import ConfigError
from elastic.swarms import elastic, lighthouse, places

CASES = [Case(seed=3, stage=3), pytest.param(Case(seed=3), marks=pytest.mark.slow)]


def ask_for_other_numbers(case: Case, folder: Path) -> str:
    with swarm_of(case) as (swarm, _), pytest.raises(ConfigError) as error:
        swarm.load(folder, reshape=True)
    return str(error.value)


def test_numbers_of_particles_and_ranks_stay(pool: Pool, tmp_path: Path) -> None:
    """Each particle reads a checkpoint that holds its own ranks alone: nothing can be made of it for others."""
    with lighthouse() as url:
        found = pool.run(ask_for_other_numbers, elastic(Case(seed=3)), tmp_path, env=places(url, 2, 2))
    assert all(message.startswith("reshape = true: in an elastic swarm") for message in found)


def export(case: Case, folder: Path) -> tuple[Path, Weights]:
    with swarm_of(case) as (swarm, engine):
        train(case, engine, range(3))  # one sync point, and a step apart
        for _ in range(10):  # all at once, over what is there
            written = swarm.export(folder)
        return written, working_weights(engine)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_particles_export_into_one_folder(pool: Pool, tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "model"
    with lighthouse() as url:
        ranks = pool.run(export, elastic(case), folder, env=places(url, 2, 2))
    for rank, (written, weights) in enumerate(ranks):
        assert written == folder / f"particle_{rank // 2}"
        model = load_file(written / "model.safetensors")
        assert_equal({name: tensor.numpy() for name, tensor in model.items()}, weights)
    assert not np.array_equal(ranks[0][1]["scale"], ranks[2][1]["scale"]), "or one could not tell whose it is"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["particle_0", "particle_1"]
