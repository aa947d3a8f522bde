"""What the launchers of test_launchers.py start: a swarm of nodes, trained for a few steps."""

import argparse
import json
import os
import socket
from pathlib import Path

import deepspeed
import torch

import ds_pso

# As it stands it compiles DeepSpeed's shared-memory collectives, under a lock that a killed rank never gives back.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--particles", default="node")
    arguments = parser.parse_args()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "swarm": {
            "particles": arguments.particles if arguments.particles == "node" else int(arguments.particles),
            "sync_interval": 2,
            "timeout_s": 60,
        },
    }
    with ds_pso.init(config) as swarm:
        layout = swarm.world.layout
        torch.manual_seed(layout.rank)
        model = torch.nn.Linear(6, 3)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        swarm.attach(engine)
        for _ in range(4):
            engine.backward(engine(torch.randn(4, 6)).square().mean())
            engine.step()
        mine = {
            "rank": layout.rank,
            "particle": swarm.particle,
            "host": socket.gethostname(),
            "local_rank": os.environ["LOCAL_RANK"],
            "weights": [value for p in engine.module.parameters() for value in p.detach().flatten().tolist()],
        }
        everyone = swarm.world.coordinator.gather("report", mine)
        if swarm.is_leader:
            arguments.report.write_text(json.dumps(everyone), encoding="utf-8")


if __name__ == "__main__":
    main()
