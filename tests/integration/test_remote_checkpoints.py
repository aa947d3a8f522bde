"""A swarm whose disks are gone goes on from what it has uploaded, bit for bit; also if it was killed meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elastic.swarms import elastic, lighthouse, places
from pool import Pool, free_port

from ds_pso.utils.remote_folder import RemoteFolder

from .jobs import Case, assert_equal, swarm_of, train, working_weights
from .test_nodes import pretend_nodes
from .test_resume import BASE, STEPS, assert_same, job, train_from_loader

PSO = replace(BASE, stage=2, sync_mode="pso", options={"inertia": 0.3, "cognitive": 0.5})


def beside(case: Case, address: str) -> Case:
    """The case, with copies of its checkpoints at that address."""
    return replace(case, swarm={**case.swarm, "remote_checkpoints": address})


@pytest.mark.slow  # as below, without the kill
@pytest.mark.parametrize("stage", [2, 3])
def test_from_an_empty_folder(pool: Pool, tmp_path: Path, stage: int) -> None:
    case = beside(replace(PSO, stage=stage), f"file://{tmp_path}/remote")
    truth = pool.run(job, case, STEPS, tmp_path / "run", 3)
    names = sorted(path.name for path in (tmp_path / "remote").iterdir())
    assert names == ["latest", "step_00000003", "step_00000003.json"]
    shutil.rmtree(tmp_path / "run")
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, tmp_path / "run", None), truth)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_00000003"]


def save_twice(case: Case, folder: Path, begin: int, end: int) -> None:
    """By DeepSpeed's own means, which the second run loads, and by those of the swarm."""
    with swarm_of(case) as (swarm, engine):
        if begin:
            engine.load_checkpoint(str(folder / "own"))
        train(case, engine, range(begin, end))
        swarm.save(folder / "run")
        engine.save_checkpoint(str(folder / "own"))


def test_a_run_that_deepspeed_has_resumed_is_the_same_run(pool: Pool, tmp_path: Path) -> None:
    case = replace(beside(PSO, f"file://{tmp_path}/remote"), particles=2)
    for begin, end in ((0, 3), (3, 5)):
        pool.run(save_twice, case, tmp_path, begin, end, world_size=2)
    names = sorted(path.name for path in (tmp_path / "remote").iterdir() if path.suffix)
    assert names == ["step_00000003.json", "step_00000005.json"]


def be_killed_in_the_second(case: Case, folder: Path) -> None:
    """All ranks at once, while a later checkpoint is on its way."""
    with swarm_of(case) as (swarm, engine):
        random.seed(swarm.world.layout.rank)
        np.random.seed(swarm.world.layout.rank)
        save = swarm.save
        swarm.save = lambda folder: save(folder, background=True)
        train_from_loader(case, swarm, engine, 3, folder, 3)
        swarm.wait_for_save()
        swarm.session.uploads.wait(30)
        train(case, engine, range(3, 5))
        put = RemoteFolder.put

        def put_and_die(self: RemoteFolder, source: Path, name: str) -> None:
            put(self, source, name)
            time.sleep(0.5)  # the others have begun, too
            os.kill(os.getpid(), signal.SIGKILL)

        RemoteFolder.put = put_and_die
        save(folder, keep=1)
        time.sleep(60)


def test_killed_as_a_whole(pool: Pool, tmp_path: Path) -> None:
    case = beside(PSO, f"file://{tmp_path}/remote")
    truth = pool.run(job, PSO, STEPS, None, None)
    ends = pool.outcomes(be_killed_in_the_second, case, tmp_path / "run")
    assert [end.kind for end in ends] == ["Killed"] * 4
    assert (tmp_path / "run/latest").read_text() == "step_00000005", "the disk was ahead"
    names = sorted(path.name for path in (tmp_path / "remote").iterdir())
    assert names == ["latest", "step_00000003", "step_00000003.json", "step_00000005"]
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, tmp_path / "fresh", None), truth)


def job_on_nodes(case: Case, steps: int, folder: Path, stop: int | None) -> Any:
    return job(case, steps, folder / f"disk-{pretend_nodes(2)}", stop)


@pytest.mark.slow
def test_each_node_fetches_its_own(pool: Pool, tmp_path: Path) -> None:
    case = beside(PSO, f"file://{tmp_path}/remote")
    truth = pool.run(job_on_nodes, case, STEPS, tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run/disk-1")  # one machine has a new disk
    assert_same(pool.run(job_on_nodes, replace(case, seed=12345), STEPS, tmp_path / "run", None), truth)
    for node in range(2):
        found = tmp_path / f"run/disk-{node}/step_00000003"
        assert [path.name for path in found.glob("particle_*")] == [f"particle_{node}"]
        assert len(list((found / "swarm").iterdir())) == 4


def weights_of(case: Case, folder: Path, steps: int, reshape: bool) -> Any:
    """Trained and saved; or loaded, if there are no steps."""
    with swarm_of(case) as (swarm, engine):
        if steps:
            train(case, engine, range(steps))
            swarm.save(folder)
        else:
            assert swarm.load(folder, reshape=reshape) == case.steps
        return working_weights(engine)


@pytest.mark.slow
def test_on_other_numbers_of_ranks(pool: Pool, tmp_path: Path) -> None:
    case = beside(Case(steps=3), f"file://{tmp_path}/remote")
    truth = pool.run(weights_of, case, tmp_path / "run", 3, False)
    found = pool.run(weights_of, case, tmp_path / "fresh", 0, True, world_size=2)
    for mine, expected in zip(found, truth[::2], strict=True):
        assert_equal(mine, expected)


@pytest.mark.slow
def test_each_elastic_particle_has_a_folder_of_its_own(pool: Pool, tmp_path: Path) -> None:
    case = beside(elastic(Case(seed=3, steps=3)), f"file://{tmp_path}/remote")
    with lighthouse() as url:
        truth = pool.run(weights_of, case, tmp_path / "run", 3, False, env=places(url, 2, 2))
    for particle in range(2):
        names = sorted(path.name for path in (tmp_path / f"remote/particle_{particle}").iterdir())
        assert names == ["latest", "step_00000003", "step_00000003.json"]
    with lighthouse() as url:
        fresh = replace(case, seed=7)
        found = pool.run(weights_of, fresh, tmp_path / "fresh", 0, False, env=places(url, 2, 2))
    for mine, expected in zip(found, truth, strict=True):
        assert_equal(mine, expected)
    assert not np.array_equal(truth[0]["scale"], truth[2]["scale"])


# -- an S3 server -------------------------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A server on loopback with a bucket; the environment that leads there."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", free_port())
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server._port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield environment
    server.stop()


@pytest.mark.slow
def test_an_s3_server(pool: Pool, tmp_path: Path, s3: dict[str, str]) -> None:
    case = beside(PSO, "s3://bucket/my/run")
    truth = pool.run(job, case, STEPS, tmp_path / "run", 3, env=s3)
    assert RemoteFolder("s3://bucket/my/run").names() == ["latest", "step_00000003", "step_00000003.json"]
    shutil.rmtree(tmp_path / "run")
    assert_same(pool.run(job, replace(case, seed=12345), STEPS, tmp_path / "run", None, env=s3), truth)


@pytest.mark.slow
def test_a_bucket_that_is_not_there(pool: Pool, tmp_path: Path, s3: dict[str, str]) -> None:
    """Training goes on; the warning is on standard error of the leader."""
    case = beside(PSO, "s3://nosuch/run")
    truth = pool.run(job, PSO, STEPS, None, None)
    assert_same(pool.run(job, case, STEPS, tmp_path / "run", 3, env=s3), truth)
