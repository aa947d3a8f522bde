"""The files for Kubernetes, SkyPilot and Ray start what they say, as far as one machine can tell.

Their commands run with the environment that these platforms set, and a torchrun that shows its arguments.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from pool import Pool

from ds_pso.distributed.layout import Layout
from launchers.test_scripts import (
    LAUNCHER,
    NODE_SCRIPT,
    ROOT,
    SHOW,
    assert_default_job,
    assert_two_particles,
    environment,
    parsed,
    run,
    stub,
)

Document = dict[str, Any]


def documents(name: str) -> dict[str, Document]:
    """By kind."""
    found = yaml.safe_load_all((LAUNCHER / name).read_text(encoding="utf-8"))
    return {document["kind"]: document for document in found}


JOBSET, PYTORCHJOB = documents("kubernetes/jobset.yaml"), documents("kubernetes/pytorchjob.yaml")
PARTICLES = JOBSET["JobSet"]["spec"]["replicatedJobs"][0]
REPLICAS = PYTORCHJOB["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
TASK = yaml.safe_load((LAUNCHER / "skypilot/task.yaml").read_text(encoding="utf-8"))


def told(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], *, resumes: bool = False
) -> Any:
    """What torchrun makes of the only call of the command.

    Args:
        given: set by the platform or by the file; there is nothing else, and the shell stops at what is not set.
    """
    stub(folder / "bin", "torchrun", SHOW)
    stub(folder / "bin", "nvidia-smi", "exit(9)")
    shown, run_dir, clone = folder / "shown", folder / "runs", folder / "clone"
    shutil.copytree(LAUNCHER, clone / "launcher")  # without the .venv of this one, which would come first
    for name in ("ds_pso", "ds_config_examples"):
        (clone / name).symlink_to(ROOT / name)
    if resumes:
        (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "checkpoints/latest").write_text("step_00000001")
    if "RUN_DIR" in given:
        given = given | {"RUN_DIR": str(run_dir)}
    run([*command], environment(folder / "bin", SHOW_IN=shown, **given), folder=clone)
    (words,) = [json.loads(line) for line in shown.read_text().splitlines()]
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        if name.startswith("PET_"):  # torchrun takes its defaults from these
            monkeypatch.setenv(name, value)
    return parsed(words)


def container(pod: Document) -> Document:
    (found,) = pod["spec"]["containers"]
    return found


def variables(pod: Document) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(pod)["env"]}


def check_pod(pod: Document) -> None:
    """No root, time for a checkpoint, a volume for it, as many GPUs as processes, and an image with a version."""
    spec, trainer = pod["spec"], container(pod)
    assert spec["securityContext"]["runAsNonRoot"]
    assert {mount["name"] for mount in trainer["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    grace = int(re.search(r"--shutdown-timeout (\d+)", trainer["args"][0])[1])
    assert grace < spec["terminationGracePeriodSeconds"]
    assert trainer["command"] == ["bash", "-euc"]
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+", trainer["image"])


def check_policy(policy: Document, label: str) -> None:
    """The pods of the swarm reach each other, and nobody else does."""
    own = {"matchLabels": {label: "swarm"}}
    assert policy["spec"]["podSelector"] == own
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": own}]}]


# -- Kubernetes -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3])
def test_a_pod_of_the_jobset_is_a_particle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    job = PARTICLES["template"]["spec"]
    pod = job["template"]
    given = variables(pod) | {"JOB_COMPLETION_INDEX": str(index)}
    found = told([*container(pod)["command"], *container(pod)["args"]], tmp_path, monkeypatch, given)
    assert (int(found.nnodes), found.node_rank) == (job["parallelism"], index)
    assert int(found.nproc_per_node) == container(pod)["resources"]["limits"]["nvidia.com/gpu"]
    name = JOBSET["JobSet"]["metadata"]["name"]
    assert (found.master_addr, found.master_port) == (f"{name}-{PARTICLES['name']}-0-0.{name}", 29500)
    assert_default_job(found)
    assert "--resume" not in found.training_script_args


def test_the_jobset_starts_all_again() -> None:
    job = PARTICLES["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["backoffLimit"]) == ("Indexed", job["parallelism"], 0)
    assert JOBSET["JobSet"]["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert JOBSET["JobSet"]["spec"]["network"]["enableDNSHostnames"]
    check_pod(job["template"])
    check_policy(JOBSET["NetworkPolicy"], "jobset.sigs.k8s.io/jobset-name")


@pytest.mark.parametrize(("kind", "rank"), [("Master", 0), ("Worker", 3)])
def test_a_pod_of_the_pytorchjob_is_a_particle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rank: int
) -> None:
    pod, spec = REPLICAS[kind]["template"], PYTORCHJOB["PyTorchJob"]["spec"]
    nodes = sum(replica["replicas"] for replica in REPLICAS.values())
    given = variables(pod) | {  # by the operator
        "MASTER_ADDR": "swarm-master-0",
        "MASTER_PORT": "23456",
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * int(spec["nprocPerNode"])),
        "PET_NNODES": str(nodes),
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": spec["nprocPerNode"],
    }
    found = told([*container(pod)["command"], *container(pod)["args"]], tmp_path, monkeypatch, given)
    assert (found.nnodes, int(found.node_rank)) == ("4", rank)
    assert int(found.nproc_per_node) == container(pod)["resources"]["limits"]["nvidia.com/gpu"]
    assert (found.master_addr, int(found.master_port)) == ("swarm-master-0", 23456)
    assert_default_job(found)


def test_the_pytorchjob_has_one_master_and_equal_pods() -> None:
    assert REPLICAS["Master"]["replicas"] == 1
    assert REPLICAS["Master"]["template"] == REPLICAS["Worker"]["template"]
    assert container(REPLICAS["Master"]["template"])["name"] == "pytorch"
    check_pod(REPLICAS["Master"]["template"])
    check_policy(PYTORCHJOB["NetworkPolicy"], "training.kubeflow.org/job-name")


@pytest.mark.parametrize("pod", [PARTICLES["template"]["spec"]["template"], REPLICAS["Worker"]["template"]])
def test_a_pod_that_is_started_again_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pod: Document) -> None:
    platform = {"JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1", "PET_NODE_RANK": "1"}
    command = [*container(pod)["command"], *container(pod)["args"]]
    found = told(command, tmp_path, monkeypatch, platform | variables(pod), resumes=True)
    assert_default_job(found)
    assert found.training_script_args[-3:] == ["--output_dir", str(tmp_path / "runs"), "--resume"]


def test_a_variable_that_nobody_sets_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above would notice a wrong name."""
    pod = PARTICLES["template"]["spec"]["template"]
    with pytest.raises(AssertionError, match="JOB_COMPLETION_INDEX: unbound variable"):
        told([*container(pod)["command"], *container(pod)["args"]], tmp_path, monkeypatch, variables(pod))


# -- Kubernetes, elastic --------------------------------------------------------------------

ELASTIC = documents("kubernetes/elastic.yaml")
LIGHTHOUSE, PLACES = ELASTIC["JobSet"]["spec"]["replicatedJobs"]


def test_the_lighthouse_is_the_one_that_ds_pso_launch_would_start(tmp_path: Path) -> None:
    from ds_pso.config.load import load_config
    from ds_pso.elastic.supervisor import Lighthouse

    config = load_config(ROOT / "ds_config_examples/zero2_elastic.json")[1]
    assert config.elastic.straggler == "wait"
    expected = Lighthouse("$(POD_IP)", 29510, config.timeout_s, config.elastic.heartbeat_s).command()
    found = container(LIGHTHOUSE["template"]["spec"]["template"])
    assert [*found["command"], *found["args"]] == [Path(expected[0]).name, *expected[1:]]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_pod_of_the_elastic_jobset_fills_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumes: bool
) -> None:
    from ds_pso.cli import launch
    from ds_pso.cli import main as cli
    from ds_pso.elastic import launch_env
    from ds_pso.training.arguments import parse_arguments

    pod = PLACES["template"]["spec"]["template"]
    given = {item["name"]: item["value"] for item in container(pod)["env"] if "value" in item}
    assert {item["name"] for item in container(pod)["env"]} - set(given) == {"POD_IP", "PARTICLE"}
    run_dir = tmp_path / "runs"
    given |= {"POD_IP": "10.0.0.9", "PARTICLE": "3", "RUN_DIR": str(run_dir)}
    if resumes:
        own = Layout(rank=3, world_size=4, num_particles=4).particle_folder(run_dir) / "checkpoints"
        own.mkdir(parents=True)
        (own / "latest").write_text("step_00000001")
    stub(tmp_path / "bin", "ds-pso", SHOW)
    command = [*container(pod)["command"], *container(pod)["args"]]
    run(command, environment(tmp_path / "bin", SHOW_IN=tmp_path / "shown", **given), folder=ROOT)
    words = json.loads((tmp_path / "shown").read_text())

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "_check_host", lambda host: None)  # not of this machine
    monkeypatch.setattr(launch, "_devices", lambda here, size, *_: {number: ["0"] * size for number in here})
    supervisor = launch.supervisor_of(cli._parser().parse_args(words))
    assert (list(supervisor.particles), supervisor.size) == (
        [3],
        container(pod)["resources"]["limits"]["nvidia.com/gpu"],
    )
    assert supervisor.lighthouse is None
    name = ELASTIC["JobSet"]["metadata"]["name"]
    assert supervisor.env[launch_env.LIGHTHOUSE] == f"http://{name}-{LIGHTHOUSE['name']}-0-0.{name}:29510"
    assert supervisor.env[launch_env.PARTICLES] == str(PLACES["replicas"])
    assert supervisor.grace_s < pod["spec"]["terminationGracePeriodSeconds"]
    assert parse_arguments(supervisor.script[1:]).resume == resumes


def test_pods_of_the_elastic_jobset_are_started_again_alone() -> None:
    for job in (LIGHTHOUSE, PLACES):
        assert job["template"]["spec"]["backoffLimit"] > 100
        assert job["template"]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert ELASTIC["JobSet"]["spec"]["successPolicy"]["targetReplicatedJobs"] == [PLACES["name"]]
    check_policy(ELASTIC["NetworkPolicy"], "jobset.sigs.k8s.io/jobset-name")


# -- SkyPilot -------------------------------------------------------------------------------


def test_a_machine_of_skypilot_is_a_particle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpus,) = re.findall(r":(\d+)$", TASK["resources"]["accelerators"])
    given = {  # by SkyPilot
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": str(TASK["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
    }
    found = told(["bash", "-euc", TASK["run"]], tmp_path, monkeypatch, given)
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "8")
    assert (found.master_addr, found.master_port) == ("10.0.0.7", 29500)
    assert_default_job(found)
    assert TASK["setup"] == "pip install ."
    assert TASK["workdir"] == "."


# -- Ray ------------------------------------------------------------------------------------


class Options:
    """What Ray's classes were given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class TorchTrainer(Options):
    made: list[TorchTrainer] = []  # noqa: RUF012

    def fit(self) -> None:
        self.made.append(self)


def load_under_a_stand_in() -> types.ModuleType:
    train, torch = types.ModuleType("ray.train"), types.ModuleType("ray.train.torch")
    train.RunConfig = train.ScalingConfig = torch.TorchConfig = Options  # type: ignore[attr-defined]
    torch.TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    sys.modules.update({"ray": types.ModuleType("ray"), "ray.train": train, "ray.train.torch": torch})
    spec = importlib.util.spec_from_file_location("torch_trainer", LAUNCHER / "ray/torch_trainer.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ray_job(arguments: list[str]) -> tuple[Any, ...]:
    """As a worker of Ray: ``main`` of the driver, and what it gives to the Trainer under Ray's process group."""
    import torch.distributed as dist

    module = load_under_a_stand_in()
    sys.argv = ["torch_trainer.py", *arguments]
    module.main()
    (trainer,) = TorchTrainer.made
    scaling = trainer.kwargs["scaling_config"].kwargs
    dist.init_process_group("gloo")  # with the environment that Ray sets, its store on MASTER_PORT
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    (start,) = trainer.args
    try:
        start(trainer.kwargs["train_loop_config"])
    except RuntimeError as error:
        return scaling, str(error)
    finally:
        dist.destroy_process_group()
    return scaling, trainer.kwargs["torch_config"].kwargs


def test_a_worker_of_ray_starts_the_script_with_a_port_of_its_own(pool: Pool, tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(
        "import json, os, sys\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "with open(f\"{sys.argv[1]}/{os.environ['RANK']}\", 'w') as file:\n"
        "    json.dump({name: os.environ[name] for name in names}, file)\n",
        encoding="utf-8",
    )
    results = pool.run(ray_job, ["--num_workers", "2", "--cpu", str(script), str(tmp_path)], world_size=2)
    assert results == [({"num_workers": 2, "use_gpu": False}, {"backend": "gloo"})] * 2
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert [(who["RANK"], who["WORLD_SIZE"]) for who in (first, second)] == [("0", "2"), ("1", "2")]


def test_a_script_that_fails_fails_the_worker_of_ray(pool: Pool, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)\n", encoding="utf-8")
    results = pool.run(ray_job, ["--num_workers", "2", str(script)], world_size=2)
    assert [said for _, said in results] == [f"rank {rank}: {script} ended with exit code 3" for rank in range(2)]
    assert results[0][0]["use_gpu"]


@pytest.mark.slow
def test_a_swarm_under_ray(pool: Pool, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--num_workers", "2", "--cpu", str(NODE_SCRIPT), "--report", str(report)]
    pool.run(ray_job, arguments, world_size=2, env={"LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}, timeout=120)
    assert_two_particles(json.loads(report.read_text()), ranks=1)


# -- the image ------------------------------------------------------------------------------


def test_the_image_has_a_version_no_root_and_all_that_is_copied_exists() -> None:
    lines = (LAUNCHER / "docker/Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if re.match(r"[A-Z]+ ", line)]
    (base,) = [step for step in steps if step.startswith("ARG BASE=")]
    assert re.search(r":[\w.-]+$", base)
    assert not base.endswith(":latest")
    copied = [name for step in steps if step.startswith("COPY ") for name in step.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert "." not in copied, "what is not copied cannot be a secret"
    users = [step for step in steps if step.startswith("USER ")]
    assert users == ["USER 1000"]
    assert steps.index(users[0]) > max(index for index, step in enumerate(steps) if step.startswith("RUN "))
    (install,) = [step for step in steps if "pip install" in step]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.search(r"\[([\w,]+)\]", install)[1].split(",")) <= set(extras)
