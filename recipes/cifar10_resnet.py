"""CIFAR-10 with a ResNet of transformers, one of the two tasks of the PSO-PS paper (arXiv 2009.03816).

accelerate launch --config_file launcher/accelerate/8gpu.yaml recipes/cifar10_resnet.py

With --deepspeed_config_file recipes/pso.json before the script, particles follow the best one, as in the paper. The
means and variances of batch normalisation are averaged over the particles whatever the rule.
"""

import argparse
import sys

import _common as recipe
import torch
from _classification import accuracy, probe
from _images import augment, load_images, to_input
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

import ds_pso
from ds_pso.training.start import run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.make_parser("cifar10_resnet", "CIFAR-10, a ResNet.", steps=4000, batch_size=32, lr=2e-3)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="local folder or hub id (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="blocks in each of the four stages (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default: %(default)s)")
    return recipe.parse(parser, argv, steps=60, batch_size=16, lr=4e-3, depth=1, width=8)


def build(depth: int, width: int, num_classes: int) -> ResNetForImageClassification:
    """A depth of 2 and a width of 64 make a ResNet-18."""
    config = ResNetConfig(
        layer_type="basic",
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[depth] * 4,
        num_labels=num_classes,
    )
    return ResNetForImageClassification(config)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        data = load_images(swarm, arguments, size=32, channels=3)

        torch.manual_seed(arguments.seed)
        model = build(arguments.depth, arguments.width, data.num_classes)
        batch_size = recipe.batch_size(swarm, arguments)

        def logits(batch: dict[str, Tensor]) -> Tensor:
            # The model begins by making images four times smaller, as those of ImageNet need it: 64 x 64 leave 16 x 16.
            return engine(F.interpolate(to_input(batch["pixels"], engine), scale_factor=2)).logits

        loader = DataLoader(data.train, batch_size=batch_size, shuffle=True)
        engine, loader, *_ = swarm.prepare(
            accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments), probe=lambda index: score(index)
        )
        score = probe(swarm, engine, data.probe, logits, batch_size)
        torch.manual_seed(arguments.seed + swarm.world.layout.rank)  # so that augmentation differs between ranks

        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                batch["pixels"] = augment(batch["pixels"])
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
