"""Checks of what scripts use: export, simulation, the Trainers, the training job; each as in ``training``."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from integration.jobs import Case, Weights, assert_close, build_engine, config, train, working_weights
from integration.oracle import train_particles
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ds_pso
from ds_pso.swarm import Swarm
from gpu.table import NotTried
from gpu.training import ON_GPU, assert_alike, bits, over_gloo

TESTS = Path(__file__).parents[1]
VOCABULARY = 256


def llama(layers: int, width: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            use_cache=False,
        )
    )


def train_llama(engine: Any, seed: int, steps: int) -> None:
    """Train on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (2, 32), generator=generator).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def export(folder: Path) -> str:
    case = over_gloo(Case(stage=3, precision="bf16", lr=1e-3, interval=2))
    torch.manual_seed(0)
    with ds_pso.init(config(case, 1)) as swarm:
        engine = build_engine(case, swarm.ds_config, llama(2, 64))
        swarm.attach(engine)
        train_llama(engine, swarm.particle, steps=3)  # a sync, and a step apart
        with swarm.consensus():
            expected = working_weights(engine)
        swarm.export(folder / "model")
        swarm.world.gather("exported", True)
        opened = AutoModelForCausalLM.from_pretrained(folder / "model")
        found = {name: value.detach().float().numpy() for name, value in opened.named_parameters()}
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
    return f"{len(found)} tensors, ZeRO 3 in bf16"


def simulation(folder: Path) -> str:
    cases = [
        Case(stage=1, seed=100, steps=6),
        Case(stage=0, seed=100, steps=6, sync_mode="diloco", swarm={"delay": 1}),
        Case(stage=2, seed=100, steps=6, sync_mode="pso", options={"inertia": 0.4, "cognitive": 0.6}),
    ]

    def life(case: Case, swarm: Swarm) -> Weights:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        assert (engine.device.type == "cuda") == ON_GPU
        train(case, engine, where=(swarm.particle, 0, 1))
        return working_weights(engine)

    for case in cases:
        found = ds_pso.simulate(config(case, 1), lambda swarm, case=case: life(case, swarm))
        for weights, truth in zip(found, train_particles(case), strict=True):
            assert_close(weights, truth, rtol=1e-4, atol=1e-4)
    return f"{len(cases)} trainings"


def hf_trainer(folder: Path) -> str:
    from test_hf_trainer import CONFIG, a_trainer, changed, joined, weights

    ds_config = changed(CONFIG, peer_backend="gloo") | {"bf16": {"enabled": ON_GPU}}
    with joined(ds_config, folder) as swarm:
        trainer = a_trainer(swarm, folder, dropout=0.1, bf16=ON_GPU)
        trainer.train()
        assert (trainer.args.device.type == "cuda") == ON_GPU
        assert swarm.totals.count == trainer.state.global_step // 4
        found = weights(trainer.model)
        assert all(np.isfinite(value).all() for value in found.values())
        assert_alike(swarm, bits(found), "weights after the last sync")
        return f"{trainer.state.global_step} steps, {swarm.totals.count} syncs{', bf16' if ON_GPU else ''}"


def accelerate_script(folder: Path) -> str:
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader, TensorDataset

    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "swarm": {"particles": 2, "sync_mode": "local_sgd", "sync_interval": 8, "peer_backend": "gloo"},
    }
    with ds_pso.init(ds_config, run_dir=folder / "run") as swarm:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        torch.manual_seed(0)
        inputs = torch.randn(1024, 8)
        data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loader = DataLoader(data, batch_size=8, shuffle=True)
        model, optimizer, loader = swarm.prepare(accelerator, model, optimizer, loader)
        losses = []
        for x, y in loader:
            assert (x.device.type == "cuda") == ON_GPU
            loss = torch.nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            losses.append(float(loss))
        accelerator.save_state(str(folder / "state"))
        swarm.export(folder / "model")
        assert_alike(swarm, bits(working_weights(swarm.engine)), "weights after the last sync")
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    return f"{len(losses)} steps, {swarm.totals.count} syncs"


def training_job(folder: Path) -> str:
    from ds_pso.training import job

    rank = os.environ["LAUNCHED_RANK"]
    text = "\n".join(inspect.getsource(module) for module in (argparse, ast, inspect, subprocess, tarfile, typing))
    temporary = folder / f".text_{rank}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "text.txt")
    ds_config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": ON_GPU},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "swarm": {"particles": 2, "sync_mode": "pso", "sync_interval": 2, "peer_backend": "gloo"},
    }
    own = folder / f"config_{rank}.json"
    own.write_text(json.dumps(ds_config), encoding="utf-8")
    arguments = ["--deepspeed_config", str(own), "--dataset", str(folder / "text.txt"), "--model", "llama:2x64"]
    arguments += ["--steps", "8", "--eval_every", "4", "--output_dir", str(folder / "run")]
    assert job.main(arguments) == 0, "the job has failed; see its output"
    events = [json.loads(line)["event"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert events.count("sync") == 4, events
    return f"8 steps, {events.count('sync')} syncs, model and report in the run folder"


def marked_tests(folder: Path) -> str:
    if not ON_GPU:
        raise NotTried("needs a GPU")
    files = [path for path in TESTS.rglob("test_*.py") if path.parent != Path(__file__).parent]
    marked = [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    assert done.returncode == 0, f"{last}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    return last
