"""CIFAR-10 with a vision transformer, from scratch.

accelerate launch --config_file launcher/accelerate/8gpu.yaml --mixed_precision bf16 recipes/vit_cifar10.py
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
from transformers import ViTConfig, ViTForImageClassification

import ds_pso
from ds_pso.training.start import run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.make_parser("vit_cifar10", "CIFAR-10, a vision transformer.", steps=20000, batch_size=32, lr=5e-4)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="local folder or hub id (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="transformer layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=4, help="pixels of a patch's side (default: %(default)s)")
    return recipe.parse(parser, argv, steps=60, batch_size=32, lr=2e-3, layers=2, width=64, patch=16)


def build(layers: int, width: int, patch: int, num_classes: int) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=32,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        num_labels=num_classes,
    )
    return ViTForImageClassification(config)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        data = load_images(swarm, arguments, size=32, channels=3)

        torch.manual_seed(arguments.seed)
        model = build(arguments.layers, arguments.width, arguments.patch, data.num_classes)
        batch_size = recipe.batch_size(swarm, arguments)

        def logits(batch: dict[str, Tensor]) -> Tensor:
            return engine(to_input(batch["pixels"], engine)).logits

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
