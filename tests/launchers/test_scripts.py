"""The files in launcher/ start what they say, as far as one machine can tell."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slow_link import network

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launcher"
SCRIPTS = [*sorted(LAUNCHER.glob("*.sh")), LAUNCHER / "slurm.sbatch"]
NODE_SCRIPT = Path(__file__).with_name("node_script.py")
REASON = network.why_not()
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_",
    "SLURM_",
    "NODE_RANK",
    "NNODES",
    "NPROC_",
    "GLOO_",
    "TORCHELASTIC",
)


def environment(*folders: Path, **more: Any) -> dict[str, str]:
    """That of a shell in which nothing was launched yet, with these folders first on the path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    path = ":".join(map(str, [*folders, Path(sys.executable).parent, os.environ["PATH"]]))
    common = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return clean | common | {name: str(value) for name, value in more.items()}


def stub(folder: Path, name: str, source: str) -> None:
    """A program for the path."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(source)}", encoding="utf-8")
    path.chmod(0o755)


def run(
    command: list[str | Path], env: dict[str, str], *, folder: Path = ROOT, seconds: float = 120, code: int = 0
) -> str:
    """Its standard output and error."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        timeout=seconds,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-5000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run(["shellcheck", script], environment())


# -- what torchrun is told ------------------------------------------------------------------------

SHOW = """
    import json, os, sys
    with open(os.environ["SHOW_IN"], "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def told(script: str, folder: Path, *arguments: str, **more: Any) -> list[list[str]]:
    """The arguments of every torchrun that the script starts."""
    stub(folder / "bin", "torchrun", SHOW)
    stub(folder / "bin", "nvidia-smi", "print('GPU 0\\nGPU 1\\nGPU 2')" if more.pop("gpus", 0) else "exit(9)")
    shown, clone = folder / "shown", folder / "clone"  # without the .venv of this one, which would come first
    shutil.copytree(LAUNCHER, clone / "launcher")
    for name in ("ds_pso", "ds_config_examples"):
        (clone / name).symlink_to(ROOT / name)
    run([clone / "launcher" / script, *arguments], environment(folder / "bin", SHOW_IN=shown, **more), folder=clone)
    return [json.loads(line) for line in shown.read_text().splitlines()]


def parsed(words: list[str]) -> Any:
    """As torchrun itself reads them."""
    from torch.distributed.run import parse_args

    return parse_args(words)


def test_two_nodes_tells_torchrun_who_is_who(tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 1234, "NODE_RANK": 1}
    ((words),) = told("two_nodes.sh", tmp_path, "mine.py", "--name", "a b", **where)
    found = parsed(words)
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "2")
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 1234)
    assert (found.training_script, found.training_script_args) == ("mine.py", ["--name", "a b"])


def test_two_nodes_counts_gpus_and_has_a_default_job(tmp_path: Path) -> None:
    (words,) = told("two_nodes.sh", tmp_path, MASTER_ADDR="10.0.0.1", NODE_RANK=0, gpus=3)
    found = parsed(words)
    assert (found.nproc_per_node, found.master_port) == ("3", 29500)
    assert_default_job(found)


def assert_default_job(found: Any) -> None:
    from ds_pso.config.load import load_config
    from ds_pso.training.arguments import parse_arguments

    assert (ROOT / found.training_script).samefile(ROOT / "ds_pso/train.py")
    arguments = parse_arguments(found.training_script_args)
    assert load_config(ROOT / arguments.deepspeed_config)[1].particles == "node"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "NODE_RANK"])
def test_two_nodes_asks_for_what_it_needs(missing: str) -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0"}
    del given[missing]
    assert f"{missing}: set it to" in run([LAUNCHER / "two_nodes.sh"], environment(**given), code=1)


def test_cpu_quickstart_tells_torchrun(tmp_path: Path) -> None:
    found = parsed(told("cpu_quickstart.sh", tmp_path, "mine.py", "--x")[0])
    assert (found.nproc_per_node, found.standalone) == ("4", True)
    assert (found.training_script, found.training_script_args) == ("mine.py", ["--x"])


# -- Slurm ------------------------------------------------------------------------------------------

SCONTROL = """
    import sys
    if sys.argv[1:] == ["requeue", "4242"]:
        open("requeued", "w").close()
        sys.exit()
    assert sys.argv[1:] == ["show", "hostnames", "node[07-08]"], sys.argv
    print("127.0.0.1\\nnode08")
"""
# One task on each node, each with its number; the worst exit code counts, as with --kill-on-bad-exit.
SRUN = """
    import os, pathlib, signal, subprocess, sys
    words = sys.argv[1:]
    assert "--kill-on-bad-exit=1" in words, words
    while words[0].startswith("-"):
        words.pop(0)
    nodes = int(os.environ["SLURM_NNODES"])
    tasks = [
        subprocess.Popen(words, env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node),
                                                  "SLURM_STEP_NUM_TASKS": str(nodes)})
        for node in range(nodes)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    pathlib.Path(sys.argv[0]).resolve().parents[1].joinpath("started").touch()  # whichever folder it runs in
    sys.exit(max(task.wait() for task in tasks))
"""


def slurm(folder: Path) -> dict[str, Any]:
    """What Slurm sets in the job, with programs in place of its own."""
    stub(folder / "bin", "scontrol", SCONTROL)
    stub(folder / "bin", "srun", SRUN)
    return {"SLURM_JOB_ID": 4242, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[07-08]"}


def test_slurm_starts_a_torchrun_on_each_node(tmp_path: Path) -> None:
    everyone = [parsed(words) for words in told("slurm.sbatch", tmp_path, SLURM_GPUS_ON_NODE=8, **slurm(tmp_path))]
    assert sorted(found.node_rank for found in everyone) == [0, 1]
    for found in everyone:
        assert (found.nnodes, found.nproc_per_node) == ("2", "8")
        assert (found.master_addr, found.master_port) == ("127.0.0.1", 24242)
        assert_default_job(found)
        assert found.training_script_args[-2:] == ["--output_dir", "runs/4242"]


def test_slurm_passes_a_script_on_word_by_word(tmp_path: Path) -> None:
    for words in told("slurm.sbatch", tmp_path, "mine.py", "a b", "$HOME", "'", **slurm(tmp_path)):
        found = parsed(words)
        assert (found.training_script, found.training_script_args) == ("mine.py", ["a b", "$HOME", "'"])


def test_slurm_fails_when_a_node_fails(tmp_path: Path) -> None:
    stub(
        tmp_path / "bin",
        "torchrun",
        "import sys; sys.exit(3 if sys.argv[sys.argv.index('--node_rank') + 1] == '1' else 0)",
    )
    env = environment(tmp_path / "bin", **slurm(tmp_path))
    run([LAUNCHER / "slurm.sbatch", "mine.py"], env, folder=tmp_path, code=3)


# A torchrun that needs a second to save, or that is done at that moment, or that fails without having been told.
TORCHRUN = """
    import signal, sys, time
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    open(f"ready {sys.argv[sys.argv.index('--node_rank') + 1]}", "w").close()
    while not told and "fails" not in sys.argv:
        time.sleep(0.01)
    time.sleep(1)
    sys.exit(0 if "done" in sys.argv else 1)
"""


@pytest.mark.parametrize(
    ("how", "signals", "code", "requeued"),
    [
        ("saves", 2, 1, True),
        ("fails", 0, 1, False),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in [("saves", 1, 1, True), ("done", 1, 0, False)]),
    ],
)
def test_slurm_requeues_what_was_asked_to_end(
    tmp_path: Path, how: str, signals: int, code: int, requeued: bool
) -> None:
    env = environment(tmp_path / "bin", **slurm(tmp_path))
    stub(tmp_path / "bin", "torchrun", TORCHRUN)
    job = subprocess.Popen([LAUNCHER / "slurm.sbatch", how], env=env, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in ("started", "ready 0", "ready 1")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(signals):
        job.terminate()
        time.sleep(0.3)
    assert job.wait(60) == code
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_resumes_a_job_that_was_requeued(tmp_path: Path) -> None:
    latest = tmp_path / "clone/runs/4242/checkpoints/latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000001")
    for words in told("slurm.sbatch", tmp_path, SLURM_GPUS_ON_NODE=8, SLURM_RESTART_COUNT=1, **slurm(tmp_path)):
        assert_default_job(parsed(words))
        assert parsed(words).training_script_args[-3:] == ["--output_dir", "runs/4242", "--resume"]
        assert parsed(words).shutdown_timeout == 170


def test_slurm_asks_for_one_task_on_each_node() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (LAUNCHER / "slurm.sbatch").read_text(), flags=re.MULTILINE)
    assert "--ntasks-per-node=1" in options
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)


@pytest.mark.slow
def test_a_swarm_under_slurm(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    env = environment(tmp_path / "bin", NPROC_PER_NODE=2, **slurm(tmp_path))
    run([LAUNCHER / "slurm.sbatch", NODE_SCRIPT, "--report", report], env, seconds=240)
    assert_two_particles(json.loads(report.read_text()), ranks=2)


# -- the hostfile -----------------------------------------------------------------------------------


def hostfile_command() -> list[str]:
    """As launcher/README.md has it."""
    (line,) = re.findall(r"^deepspeed --hostfile .+$", (LAUNCHER / "README.md").read_text(), flags=re.MULTILINE)
    return shlex.split(line)[1:]


def test_deepspeed_reads_the_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import encode_world_info, fetch_hostfile, parse_args, parse_inclusion_exclusion

    monkeypatch.chdir(ROOT)
    arguments = parse_args(hostfile_command())
    pool = fetch_hostfile(arguments.hostfile)
    assert dict(pool) == {"node-1": 8, "node-2": 8}
    active = parse_inclusion_exclusion(pool, arguments.include, arguments.exclude)
    world = {host: list(range(slots)) if isinstance(slots, int) else slots for host, slots in active.items()}
    assert world == {"node-1": list(range(8)), "node-2": list(range(8))}
    arguments.master_addr = "10.0.0.1"
    command, _, _ = PDSHRunner(arguments, encode_world_info(world)).get_cmd({}, active)
    assert command[command.index("-w") + 1] == "node-1,node-2"
    assert Path(command[command.index("--deepspeed_config") - 1]).samefile(ROOT / "ds_pso/train.py")


WHO = """
    import os
    with open(f"{__file__}.{os.environ['RANK']}", "w") as file:
        file.write(" ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
"""


@pytest.mark.slow
def test_the_ranks_that_deepspeed_starts_from_the_hostfile(tmp_path: Path) -> None:
    """Its launcher, as pdsh would call it on each host, with a program that says which rank it is."""
    from deepspeed.launcher.runner import encode_world_info, fetch_hostfile

    stub(tmp_path, "who", WHO)
    world = {host: list(range(slots)) for host, slots in fetch_hostfile(LAUNCHER / "hostfile.example").items()}
    for node in range(2):
        launch = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={encode_world_info(world)}"]
        where = [f"--node_rank={node}", "--master_addr=10.0.0.1", "--master_port=29500"]
        run([*launch, *where, "--no_python", "--no_local_rank", tmp_path / "who"], environment())
    found = {int(path.suffix[1:]): path.read_text() for path in tmp_path.glob("who.*")}
    assert found == {rank: f"16 {rank % 8} 8" for rank in range(16)}


# -- true starts --------------------------------------------------------------------------------------


def assert_two_particles(everyone: list[dict[str, Any]], ranks: int, hosts: list[str] | None = None) -> None:
    assert [rank["rank"] for rank in everyone] == list(range(2 * ranks))
    assert [rank["particle"] for rank in everyone] == [0] * ranks + [1] * ranks
    if hosts is not None:
        assert [rank["host"] for rank in everyone] == [host for host in hosts for _ in range(ranks)]
    for rank in everyone[1:]:  # they have just met
        assert rank["weights"] == everyone[0]["weights"]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.slow
def test_two_nodes_with_an_address_and_a_name_each(tmp_path: Path) -> None:
    report, hosts = tmp_path / "report.json", ["node-a", "node-b"]
    with network.slow_link(1e9) as link:
        nodes = []
        for number in (1, 0):  # the second one may come first
            env = environment(
                MASTER_ADDR=link.addresses[0], NODE_RANK=number, NPROC_PER_NODE=1, GLOO_SOCKET_IFNAME=network.INTERFACE
            )
            inside = f'hostname {hosts[number]} && exec "$@"'
            words = [
                "unshare",
                "--uts",
                "sh",
                "-c",
                inside,
                "sh",
                LAUNCHER / "two_nodes.sh",
                NODE_SCRIPT,
                "--report",
                report,
            ]
            output = (tmp_path / f"output_{number}").open("w")
            nodes.append(
                subprocess.Popen(
                    link.command(number, *map(str, words)), cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
                )
            )
        codes = [node.wait(timeout=120) for node in nodes]
    assert codes == [0, 0], "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("output_*"))
    assert_two_particles(json.loads(report.read_text()), ranks=1, hosts=hosts)


@pytest.mark.slow
def test_cpu_quickstart(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    env = environment() | {"CUDA_VISIBLE_DEVICES": "0"}  # it hides what there is
    run([LAUNCHER / "cpu_quickstart.sh", NODE_SCRIPT, "--report", report, "--particles", "2"], env, seconds=240)
    everyone = json.loads(report.read_text())
    assert [rank["local_rank"] for rank in everyone] == ["0", "1", "2", "3"]
    assert_two_particles(everyone, ranks=2)


@pytest.mark.slow
def test_cpu_quickstart_as_it_is(tmp_path: Path) -> None:
    """Elsewhere than in the root of the repository; it writes its run folder there."""
    env = environment()
    done = subprocess.run([LAUNCHER / "cpu_quickstart.sh"], cwd=tmp_path, env=env, timeout=280, check=False)
    assert done.returncode == 0
    assert (tmp_path / "runs/cpu_quickstart/model/config.json").is_file()
