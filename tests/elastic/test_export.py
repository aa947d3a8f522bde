"""In an elastic swarm each particle exports its own model, beside those of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from integration.jobs import Case, Weights, assert_equal, swarm_of, train, working_weights
from pool import Pool
from safetensors.torch import load_file

from elastic.swarms import elastic, lighthouse, places

CASES = [Case(seed=3, stage=3), pytest.param(Case(seed=3), marks=pytest.mark.slow)]


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
