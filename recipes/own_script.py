"""The four lines that turn a plain DeepSpeed script into a swarm; everything else is DeepSpeed as usual.

deepspeed --num_gpus 4 recipes/own_script.py
torchrun --nproc_per_node 4 recipes/own_script.py
accelerate launch --use_deepspeed --num_processes 4 recipes/own_script.py
"""

import argparse

import deepspeed
import torch
from torch.utils.data import DataLoader, TensorDataset

import ds_pso

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "swarm": {"particles": 2, "sync_mode": "local_sgd", "sync_interval": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed_config", default=CONFIG)
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    arguments = parser.parse_args()

    with ds_pso.init(arguments.deepspeed_config) as swarm:  # 1: before anything else initialises
        inputs = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(inputs, inputs.pow(2).sum(1, keepdim=True))
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=swarm.ds_config,  # 2: DeepSpeed's part of the JSON
        )
        swarm.attach(engine)  # 3: engine.step() now syncs with the other particles when it is due

        batch_size = engine.train_micro_batch_size_per_gpu()
        loader = DataLoader(data, batch_size=batch_size, sampler=swarm.sampler(data, batch_size=batch_size))
        for epoch in range(4):
            for x, y in loader:
                loss = torch.nn.functional.mse_loss(engine(x.to(engine.device)), y.to(engine.device))
                engine.backward(loss)
                engine.step()
            losses = swarm.gather(loss.item())
            if swarm.is_leader:
                print(f"epoch {epoch}: loss of each particle {[round(value, 3) for value in losses]}")

        swarm.merge()  # 4: every engine now holds the model that the particles are together; evaluate and save that
        with torch.no_grad():
            x, y = data.tensors
            loss = torch.nn.functional.mse_loss(engine(x.to(engine.device)), y.to(engine.device)).item()
        if swarm.is_leader:
            print(f"loss of their model {loss:.3f}")


if __name__ == "__main__":
    main()
