"""A swarm by Ray Train: starts a script on every worker, with the environment that a launcher would give it.

    python launcher/ray/torch_trainer.py --num_workers 16 ds_pso/train.py --deepspeed_config ...

Ray places the workers and numbers them node by node, so with "particles": "node" each node is a particle. The script
is a process of its own: Ray has a process group in the worker, and runs its function in a thread, where no signal can
be heard.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def agree_on_a_port() -> int:
    """Return a free port of rank 0, on all workers: Ray's own process group holds the one in MASTER_PORT."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = torch.tensor([probe.getsockname()[1]])
    dist.broadcast(port, src=0)
    return int(port)


def start(config: dict[str, Any]) -> None:
    """Run the script as this worker's rank, from its start to its end.

    Raises:
        RuntimeError: it has failed.
    """
    environment = {**os.environ, "MASTER_PORT": str(agree_on_a_port())}
    process = subprocess.Popen([sys.executable, *config["command"]], env=environment, cwd=config["folder"])
    try:
        code = process.wait()
    finally:
        process.terminate()  # if Ray ends this worker
    if code != 0:
        raise RuntimeError(f"rank {environment['RANK']}: {config['command'][0]} ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a script on the workers of Ray Train.")
    parser.add_argument("--num_workers", type=int, required=True, help="ranks, on all nodes together")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    parser.add_argument("--storage_path", default=None, help="Ray's own folder, which all nodes reach")
    parser.add_argument("script", help="and after it its arguments; at the same path on every node")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    trainer = TorchTrainer(
        start,
        train_loop_config={"command": [given.script, *given.arguments], "folder": str(Path.cwd())},
        torch_config=TorchConfig(backend="gloo"),  # Ray's group is used for the port alone
        scaling_config=ScalingConfig(num_workers=given.num_workers, use_gpu=not given.cpu),
        run_config=RunConfig(name="swarm", storage_path=given.storage_path),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
