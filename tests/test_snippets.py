"""The documentation, executed on real or simulated ranks: configs train, fragments and scripts run as they stand."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import math
import os
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from test_docs import PAGES, ROOT, TEXT, blocks, page, short

import ds_pso
from ds_pso.cli import main as cli


def part_of(diff: str, sign: str) -> str:
    """The file before ("-") or after ("+")."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)) + "\n"


CONFIGS = {
    f"{short(path)}-{index}": json.loads(snippet)
    for path in PAGES
    for index, snippet in enumerate(blocks(TEXT[path], "json"))
} | {
    f"{short(path)}-diff-{index}": json.loads(part_of(diff, "+"))
    for path in PAGES
    for index, diff in enumerate(blocks(TEXT[path], "diff"))
    if part_of(diff, "+").startswith("{")
}


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """What a fragment leaves open, and torch's optimizer, so that DeepSpeed compiles nothing."""
    base = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    config = base | copy.deepcopy(config)
    config["optimizer"]["params"]["torch_adam"] = True
    config.setdefault("swarm", {"particles": 2})
    if config["swarm"].get("particles", "node") == "node":
        config["swarm"]["particles"] = 2
    return config


# -- configs --------------------------------------------------------------------------------


def train_on(configs: list[dict[str, Any]], folder: Path) -> list[list[tuple[str, float]]]:
    """Of each swarm and particle what it says of itself, and its loss after some steps and a sync point."""
    import deepspeed
    import torch

    os.chdir(folder)
    sys.path.insert(0, str(ROOT / "recipes"))  # the module that a snippet names as its sync_mode

    def train(swarm: ds_pso.Swarm) -> tuple[str, float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        x = torch.ones(2, 4, dtype=next(engine.parameters()).dtype)
        swarm.attach(engine, probe=lambda index: engine(x).float().square().mean())
        while engine.global_steps < 3:
            loss = engine(x).float().square().mean()
            engine.backward(loss)
            engine.step()
        swarm.sync()
        return swarm.describe(), float(engine(x).float().square().mean())

    return [ds_pso.simulate(config, train) for config in configs]


def test_every_config_of_the_documentation_trains(pool: Pool, tmp_path: Path) -> None:
    configs = {name: completed(config) for name, config in CONFIGS.items()}
    (results,) = pool.run(train_on, list(configs.values()), tmp_path, world_size=1, timeout=120)
    for (name, config), particles in zip(configs.items(), results, strict=True):
        section = config["swarm"]
        mode = section.get("sync_mode", "local_sgd")
        assert len(particles) == (1 if mode == "allreduce" else section["particles"]), name
        for said, loss in particles:
            if section.get("sync_interval") == "never":
                assert said.endswith("without sync points of their own"), name
            else:
                assert mode in said or mode == "allreduce", name
            assert math.isfinite(loss), name


# -- fragments ------------------------------------------------------------------------------


def run_fragments(fragments: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """The fragments of the pages in the order of a script, and what they leave behind in each particle."""
    import deepspeed
    import torch

    os.chdir(folder)
    config = completed({"swarm": {"particles": 2, "fitness": "probe", "sync_interval": 2}})
    config["scheduler"] = {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 1}}

    def train(swarm: ds_pso.Swarm) -> dict[str, Any]:
        model = torch.nn.Linear(4, 1)
        x, y = torch.ones(1024, 4), torch.zeros(1024, 1)
        names = {"ds_pso": ds_pso, "torch": torch, "sys": sys, "swarm": swarm, "num_steps": 4}
        names |= {"probe_x": x, "probe_y": y, "test_x": x, "test_y": y}
        exec(fragments["length"], names)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        names["engine"] = engine
        exec(fragments["probe"], names)
        for _ in range(4):
            engine.backward(engine(x[:2]).square().mean())
            engine.step()
        exec(fragments["consensus"], names)
        swarm.log("held_out", losses=swarm.gather(1.0))
        exec(fragments["metrics"], names)
        return {
            "loss": float(names["loss"]),
            "last_losses": swarm.last_losses,
            "held_out": names["held_out"],
            "waited": names["waited"],
        }

    return ds_pso.simulate(config, train, run_dir="runs/latest")


def test_fragments_do_what_the_pages_say(pool: Pool, tmp_path: Path) -> None:
    fragments = {
        "length": fragment("docs/configuration.md", "total_num_steps"),
        "probe": fragment("docs/api.md", "def probe"),
        "consensus": fragment("docs/api.md", "swarm.consensus()"),
        "metrics": fragment("docs/training.md", "read_metrics"),
    }
    ((first, second),) = pool.run(run_fragments, fragments, tmp_path, world_size=1)
    assert first["loss"] == second["loss"], "the consensus is one model"
    assert first["loss"] < first["last_losses"][0] + 1e-6, "scored by the probe on the same batch"
    assert first["held_out"] == [(4, [1.0, 1.0])]
    assert first["waited"] >= 0


def test_an_error_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    def main(*_: Any, **__: Any) -> None:
        raise ds_pso.ConfigError("what is wrong")

    for rank in (0, 1):
        with pytest.raises(SystemExit) as end:
            exec(fragment("docs/api.md", "SystemExit"), {"ds_pso": ds_pso, "sys": sys, "rank": rank, "main": main})
        assert end.value.code == 1
    assert capsys.readouterr().err == "what is wrong\n"


def test_the_test_of_the_testing_page_passes(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prelude = "from integration.jobs import Case, swarm_of, train, working_weights\n"
    snippet = fragment("docs/testing.md", "def test_something") + "    return ranks\n"
    (tmp_path / "test_of_the_page.py").write_text(prelude + snippet, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    ranks = importlib.import_module("test_of_the_page").test_something(pool)
    assert len(ranks) == 4


def fragment(name: str, word: str) -> str:
    """The one of this page that the word stands in, where no complete script does."""
    (found,) = [block for block in blocks(page(name), "python") if word in block and "__main__" not in block]
    return found


# -- scripts --------------------------------------------------------------------------------


def execute(script: str, config: dict[str, Any], folder: Path) -> str:
    """What a script with this ``ds_config.json`` prints on this rank."""
    rank_folder = folder / os.environ["RANK"]
    rank_folder.mkdir()
    (rank_folder / "ds_config.json").write_text(json.dumps(config), encoding="utf-8")
    (rank_folder / "script.py").write_text(script, encoding="utf-8")
    os.chdir(rank_folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path("script.py", run_name="__main__")
    return output.getvalue()


README_SCRIPT = """
import deepspeed, torch
from torch.utils.data import DataLoader
dataset = torch.arange(320.0).view(320, 1)
model = torch.nn.Linear(1, 1)
{}
samples = [int(value) for batch in DataLoader(dataset, batch_size=8, sampler=sampler) for value in batch]
print(swarm.describe(), sorted(samples))
swarm.close()
"""


def test_the_four_lines_of_the_readme(pool: Pool, tmp_path: Path) -> None:
    """With the JSON of the README."""
    script = README_SCRIPT.format(part_of(blocks(page("README.md"), "diff")[0], "+"))
    printed = pool.run(execute, script, completed(CONFIGS["README.md-0"]), tmp_path)
    said, samples = zip(*(line.splitlines()[-1].split(" [") for line in printed), strict=True)
    assert set(said) == {"4 particles x 1 rank, local_sgd every 8 steps in int4, 2 steps late"}
    assert sorted(int(sample) for mine in samples for sample in mine.rstrip("]").split(", ")) == list(range(320))


def test_the_script_of_the_simulation_page(pool: Pool, tmp_path: Path) -> None:
    script = fragment("docs/simulation.md", "ds_pso.simulate(CONFIG, train)")
    (printed,) = pool.run(execute, script, {}, tmp_path, world_size=1)
    losses = json.loads(printed)
    assert len(losses) == 4
    assert max(losses) < 8  # the variance of the sum of eight numbers is what a model that knows nothing is off


def quick_start(sign: str) -> tuple[str, dict[str, Any]]:
    return part_of(blocks(page("docs/quick-start.md"), "diff")[0], sign), CONFIGS["docs/quick-start.md-0"]


def test_the_script_of_the_quick_start(pool: Pool, tmp_path: Path) -> None:
    promised = blocks(page("docs/quick-start.md"), "text")[-1]
    printed = pool.run(execute, *quick_start("+"), tmp_path)
    assert printed[0].endswith(promised)
    assert all(promised not in line for line in printed[1:])


def test_the_script_of_the_quick_start_before(pool: Pool, tmp_path: Path) -> None:
    assert all("particles" not in line for line in pool.run(execute, *quick_start("-"), tmp_path, world_size=2))


PIPELINE_SCRIPT = """
import torch
from deepspeed.pipe import LayerSpec
from safetensors.torch import load_file
from torch.utils.data import TensorDataset
dataset = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
layers, loss_fn, steps = [LayerSpec(torch.nn.Linear, 3, 4), LayerSpec(torch.nn.Linear, 4, 1)], torch.nn.MSELoss(), 3
{}
print(loss.shape, sorted(load_file("model/model.safetensors")) if swarm.is_leader else None)
"""


def test_the_pipeline_of_the_zero_page(pool: Pool, tmp_path: Path) -> None:
    script = PIPELINE_SCRIPT.format(fragment("docs/zero.md", "PipelineModule"))
    printed = pool.run(execute, script, completed({"swarm": {"particles": 2, "sync_interval": 2}}), tmp_path)
    said = [line.splitlines()[-1] for line in printed]
    assert said == ["torch.Size([]) ['0.bias', '0.weight', '1.bias', '1.weight']"] + ["torch.Size([]) None"] * 3


# -- commands -------------------------------------------------------------------------------


def simulations() -> list[tuple[str, ...]]:
    lines = [line for text in TEXT.values() for block in blocks(text, "sh") for line in block.splitlines()]
    return sorted({tuple(shlex.split(line)[1:]) for line in lines if line.startswith("ds-pso simulate")})


def simulate_each(commands: list[list[str]], folder: Path, script: str, config: dict[str, Any]) -> list[int]:
    os.chdir(folder)
    for name in ("ds_pso", "ds_config_examples"):
        Path(name).symlink_to(ROOT / name)
    Path("script.py").write_text(script, encoding="utf-8")
    Path("ds_config.json").write_text(json.dumps(config), encoding="utf-8")
    Path("words.txt").write_text("\n".join(textwrap.wrap("swarm particle shard velocity " * 2000)), encoding="utf-8")
    return [cli.main(command) for command in commands]


def test_simulations_run_as_written(pool: Pool, tmp_path: Path) -> None:
    """But on less text, with a smaller model, and for a few steps."""
    small = shlex.split("--steps 8 --seq_length 16 --model llama:1x32 --dataset words.txt --eval_every 8")
    commands = [[*words, *(small if words[1].endswith("train.py") else [])] for words in simulations()]
    assert len(commands) >= 2
    (codes,) = pool.run(simulate_each, commands, tmp_path, *quick_start("+"), world_size=1, timeout=120)
    assert codes == [0] * len(commands)
    assert (tmp_path / "runs/latest/model/model.safetensors").exists()
