"""The user's script for test_launchers.py: three lines of ds_pso around plain DeepSpeed, and a save."""

import argparse
import json
import os
import random
import time
from pathlib import Path

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ds_pso


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--until_asked", action="store_true", help="slowly, and save and stop at SIGTERM")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    arguments = parser.parse_args()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "swarm": {"particles": 2, "sync_mode": "diloco", "sync_interval": 2, "timeout_s": 60},
    }
    random.seed(os.getpid())  # what a resumed run draws must come from the checkpoint
    with ds_pso.init(config) as swarm:
        torch.manual_seed(int(os.environ["RANK"]))
        data = TensorDataset(torch.randn(256, 6, generator=torch.Generator().manual_seed(0)))
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 1))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        swarm.attach(engine)
        loader = DataLoader(data, batch_size=4, sampler=swarm.sampler(data), generator=torch.Generator())
        if arguments.resume:
            swarm.load(arguments.folder)
        if arguments.until_asked:
            swarm.should_stop()
            (arguments.folder / f"pid_{swarm.world.layout.rank}").write_text(str(os.getpid()))
        while engine.global_steps < arguments.steps:
            for (x,) in loader:
                engine.backward((engine(x) - x.sum(1, keepdim=True)).square().mean())
                engine.step()
                if engine.global_steps == 3 and not arguments.resume:
                    swarm.save(arguments.folder, background=arguments.until_asked)
                if engine.global_steps == arguments.steps:
                    break
                if arguments.until_asked:
                    time.sleep(0.05)
                    if swarm.should_stop():
                        swarm.save(arguments.folder)
                        swarm.close()
                        raise SystemExit(ds_pso.EXIT_PREEMPTED)
        report = {
            "particle": swarm.particle,
            "world": [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]],
            "weights": [p.detach().flatten().tolist() for p in engine.module.parameters()],
            "pid": os.getpid(),
        }
        everyone = swarm.world.coordinator.gather("report", report)
        if swarm.is_leader:
            name = "resumed.json" if arguments.resume else "first.json"
            (arguments.folder / name).write_text(json.dumps(everyone))


if __name__ == "__main__":
    main()
