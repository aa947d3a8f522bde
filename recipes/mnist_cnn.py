"""MNIST with a small convolutional network, one of the two tasks of the PSO-PS paper (arXiv 2009.03816).

accelerate launch --config_file launcher/accelerate/cpu.yaml recipes/mnist_cnn.py --smoke

With --deepspeed_config_file recipes/pso.json before the script, particles follow the best one, as in the paper.
"""

import argparse
import sys

import _common as recipe
import torch
from _classification import accuracy, probe
from _images import load_images, to_input
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ds_pso
from ds_pso.training.start import run


class ConvNet(nn.Module):
    """Three convolutions of stride 2, 28 x 28 -> 4 x 4, and a linear layer: 34 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 10) logits."""
        return self.layers(images)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.make_parser("mnist_cnn", "MNIST, a small CNN.", steps=1500, batch_size=16, lr=2e-3)
    parser.add_argument("--dataset", default="ylecun/mnist", help="local folder or hub id (default: %(default)s)")
    return recipe.parse(parser, argv, steps=40, lr=4e-3)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        data = load_images(swarm, arguments, size=28, channels=1)

        torch.manual_seed(arguments.seed)
        model = ConvNet()
        batch_size = recipe.batch_size(swarm, arguments)

        def logits(batch: dict[str, Tensor]) -> Tensor:
            return engine(to_input(batch["pixels"], engine))

        loader = DataLoader(data.train, batch_size=batch_size, shuffle=True)
        engine, loader, *_ = swarm.prepare(
            accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments), probe=lambda index: score(index)
        )
        score = probe(swarm, engine, data.probe, logits, batch_size)

        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                loss = F.cross_entropy(logits(batch).float(), batch["labels"])
                accelerator.backward(loss)  # takes the optimizer's step, too, and syncs when it is due

        with swarm.consensus():
            result = accuracy(swarm, engine, data.test, logits, batch_size)
        swarm.export(arguments.output_dir / "model")
        recipe.finish(swarm, arguments, "accuracy", result)


def main(argv: list[str] | None = None) -> int:
    return run(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
