"""The ground of the recipes: "auto" filled, data sharded once over all ranks, config files that fit together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from pool import free_port
from torch.utils.data import DataLoader
from variants import slow_but

from ds_pso.config.load import load_config

from .test_recipes import ROOT, load_recipe, under_accelerate

BIN = Path(sys.executable).parent
LAUNCHER_FILES = sorted((ROOT / "launcher/accelerate").glob("*.yaml"))
SAMPLES, BATCH, RANKS = 103, 2, 4  # 12 batches a rank and epoch, and seven samples left over


def train_for_two_epochs(steps: int, plain: bool) -> dict[str, Any]:
    """Which samples this rank saw, and what became of "auto"."""
    import _common as recipe
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso

    arguments = recipe.make_parser("test", "", steps=steps, batch_size=BATCH, lr=0.25).parse_args([])
    with ds_pso.init() as swarm:
        plugin = None if plain else DeepSpeedPlugin(hf_ds_config=swarm.ds_config)  # None: it reads the JSON itself
        accelerator = Accelerator(deepspeed_plugin=plugin)
        model = torch.nn.Linear(1, 1)
        loader = DataLoader(torch.arange(SAMPLES), batch_size=recipe.batch_size(swarm, arguments), shuffle=True)
        engine, loader, *_ = swarm.prepare(accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments))
        seen = []
        for batch in recipe.batches(swarm, engine, loader, steps):
            seen.append(batch.tolist())
            with accelerator.accumulate(engine):
                accelerator.backward(engine(batch[:, None] / SAMPLES).square().mean())
        return {
            "seen": seen,
            "steps": engine.global_steps,
            "syncs": swarm.totals.count,
            "batch_size": engine.train_micro_batch_size_per_gpu(),
            "total_num_steps": engine.lr_scheduler.total_num_steps,
            "highest_lr": engine.lr_scheduler.max_lrs,
        }


CONFIGS = {
    "as_it_is": ({}, 24),
    "batch_size": ({"train_batch_size": "auto"}, 24),
    "accumulation": ({"gradient_accumulation_steps": 2, "train_batch_size": "auto"}, 12),
    # Each particle has a monitor, and must not write into the files of another.
    "monitor": ({"csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "job"}}, 24),
    # A rule that has to know how long training is, where the JSON says "auto".
    "progress": ({"swarm": {"particles": 2, "sync_mode": "nosync", "sync_interval": 8}}, 24),
}


@pytest.mark.parametrize("name", slow_but(["as_it_is", "accumulation", "progress"], CONFIGS))
def test_auto_is_filled_and_every_sample_is_seen_once(pool, tmp_path, name):
    changes, steps = CONFIGS[name]
    config = json.loads((ROOT / "recipes/local_sgd.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes).replace('"csv"', json.dumps(str(tmp_path / "csv"))))
    ranks = pool.run(
        train_for_two_epochs, steps, name in ("as_it_is", "monitor", "progress"), env=under_accelerate(path)
    )
    if name == "monitor":
        assert {folder.name for folder in (tmp_path / "csv/job").iterdir()} == {"particle_0", "particle_1"}
    for rank in ranks:
        assert rank["steps"] == rank["total_num_steps"] == steps
        assert rank["syncs"] == steps // 8
        assert rank["batch_size"] == BATCH
        assert rank["highest_lr"] == [0.25]
        assert [len(batch) for batch in rank["seen"]] == [BATCH] * 24
    epochs = [
        [sample for rank in ranks for batch in rank["seen"][first : first + 12] for sample in batch]
        for first in (0, 12)
    ]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == SAMPLES // (RANKS * BATCH) * RANKS * BATCH
    assert epochs[0] != epochs[1]


def test_a_number_in_the_json_counts(pool):
    config = ROOT / "ds_config_examples/zero2_local_sgd.json"  # "auto" stands only for the number of steps
    for rank in pool.run(train_with_an_example, env=under_accelerate(config)):
        assert rank == {"loader": 4, "batch_size": 4, "total_num_steps": 8, "highest_lr": [0.002]}


def train_with_an_example() -> dict[str, Any]:
    import _common as recipe
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso

    arguments = recipe.make_parser("test", "", steps=8, batch_size=BATCH, lr=0.25).parse_args([])
    with ds_pso.init() as swarm:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        model = torch.nn.Linear(1, 1)
        loader = DataLoader(torch.arange(SAMPLES), batch_size=recipe.batch_size(swarm, arguments), shuffle=True)
        engine, loader, *_ = swarm.prepare(accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments))
        return {
            "loader": loader.total_batch_size,
            "batch_size": engine.train_micro_batch_size_per_gpu(),
            "total_num_steps": engine.lr_scheduler.total_num_steps,
            "highest_lr": engine.lr_scheduler.max_lrs,
        }


@pytest.mark.parametrize("path", LAUNCHER_FILES, ids=lambda path: path.name)
def test_launcher_files_name_configs_that_fit(path):
    launcher = load_config_from_file(str(path))
    assert launcher.distributed_type == "DEEPSPEED"
    _, swarm = load_config(ROOT / launcher.deepspeed_config["deepspeed_config_file"])
    assert launcher.num_processes % launcher.num_machines == 0
    particles = launcher.num_machines if swarm.particles == "node" else swarm.particles
    assert launcher.num_processes % particles == 0
    assert particles == {"1gpu.yaml": 1}.get(path.name, 2)


def test_all_launcher_files_are_there():
    assert [path.name for path in LAUNCHER_FILES] == ["1gpu.yaml", "2nodes.yaml", "8gpu.yaml", "cpu.yaml"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.name)
def test_configs_of_the_recipes_are_accepted(path):
    load_config(path)


def launch(*words: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_"))}
    clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [f"{BIN}/accelerate", "launch", *words],
        cwd=ROOT,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_accelerate_launch_on_a_cpu(tmp_path):
    job = launch(
        *("--config_file", "launcher/accelerate/cpu.yaml", "--main_process_port", str(free_port())),
        *("recipes/mnist_cnn.py", "--smoke", "--output_dir", str(tmp_path / "run")),
    )
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 0, output
    assert "2 particles x 2 ranks, local_sgd every 8 steps" in output
    (accuracy,) = re.findall(r"^final accuracy ([\d.]+) \(the consensus of 2 particles\)", output, flags=re.MULTILINE)
    assert float(accuracy) > 0.7
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_on_loopback(tmp_path):
    """Each machine is a particle; both are this one, with two processes each."""
    port = str(free_port())
    jobs = [
        launch(
            *("--config_file", "launcher/accelerate/2nodes.yaml", "--num_processes", "4", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("recipes/mnist_cnn.py", "--smoke", "--output_dir", str(tmp_path / "run")),
        )
        for rank in range(2)
    ]
    outputs = [job.communicate(timeout=250)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert "2 particles x 2 ranks, local_sgd every 32 steps" in outputs[0]
    assert "the consensus of 2 particles" in outputs[0]
    assert "final" not in outputs[1]


def test_readme_has_a_row_for_each_recipe():
    text = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|", text, flags=re.MULTILINE))
    assert rows == {path.name for path in (ROOT / "recipes").glob("[!_]*.py")}


@pytest.mark.parametrize("name", ["mnist_cnn", "causal_lm_finetune"])
def test_what_is_given_counts_more_than_smoke(name):
    recipe = load_recipe(name)
    assert recipe.parse([]).steps > 400
    assert recipe.parse(["--smoke"]).steps <= 100
    assert recipe.parse(["--smoke", "--steps", "7"]).steps == 7
