"""What is trained: four small models that one core trains in seconds to a minute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence.data import SEQ_LENGTH, Data, Split
from ds_pso.training.model import build_model, causal_loss


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizer.

    ``loss`` takes the engine and a batch, and returns the mean loss and the number of samples that the
    model got right (NaN where that is not a question).
    """

    data: str
    build: Callable[[Data, float], nn.Module]  # the float multiplies the model's widths
    loss: Callable[[Any, Split], tuple[Tensor, float]]
    disturb: Callable[[Split], Split]  # a batch from which nothing can be learned
    optimizer: Mapping[str, Any]  # DeepSpeed's section, without the learning rate
    lr: float  # the middle of the rates that are tried
    batch: int  # samples per particle and step
    samples: int  # of all particles together
    probe_batch: int  # samples on which the rules that score weights do it
    metric: Literal["accuracy", "loss"]  # what tables report and tuning looks at
    train_slice: slice  # of the training data, on which the final model is evaluated
    clip: float = 0.0  # gradient norm; 0: any
    tuning_seeds: int = 1  # of the runs that find the learning rates
    sort_by: Callable[[Split], Tensor] | None = None  # key of the non-iid order; None: the order of the files


class ConvNet(nn.Module):
    """Convolutions of stride 2 over uint8 images, which it normalises itself, and a linear layer."""

    def __init__(self, channels: list[int], image_size: int, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            kernel = 3 if i else 5
            layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
            image_size = (image_size + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * image_size**2, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, height, width) uint8 -> (N, num_classes) logits."""
        return self.layers(images.float() / 64 - 2)


def _conv_net(channels: list[int], image_size: int) -> Callable[[Data, float], nn.Module]:
    def build(data: Data, scale: float) -> nn.Module:
        return ConvNet([channels[0], *(round(width * scale) for width in channels[1:])], image_size)

    return build


def _llama(layers: int, width: int) -> Callable[[Data, float], nn.Module]:
    def build(data: Data, scale: float) -> nn.Module:
        name = f"llama:{layers}x{max(32, round(width * scale / 32) * 32)}"
        return build_model(name, data.tokenizer, SEQ_LENGTH, {})

    return build


def _classify(engine: Any, batch: Split) -> tuple[Tensor, float]:
    images, labels = batch
    logits = engine(images)
    correct = float((logits.argmax(1) == labels).sum()) if not torch.is_grad_enabled() else float("nan")
    return F.cross_entropy(logits, labels), correct


def _predict_tokens(engine: Any, batch: Split) -> tuple[Tensor, float]:
    return causal_loss(engine, batch[0]), float("nan")


def _random_labels(batch: Split) -> Split:
    images, labels = batch
    return images, torch.randint_like(labels, 10)


def _shuffled_tokens(batch: Split) -> Split:
    (tokens,) = batch
    return (tokens.gather(1, torch.rand(tokens.shape, device=tokens.device).argsort(1)),)


_SGD = {"type": "SGD", "params": {"momentum": 0.9}}
_ADAMW = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}


def _image_task(data: str, channels: list[int], image_size: int, lr: float, tuning_seeds: int = 1) -> Task:
    return Task(
        data=data,
        build=_conv_net(channels, image_size),
        loss=_classify,
        disturb=_random_labels,
        optimizer=_SGD,
        lr=lr,
        batch=16,
        samples=65_536,
        probe_batch=256,
        metric="accuracy",
        train_slice=slice(5000),
        sort_by=lambda split: split[1],
        tuning_seeds=tuning_seeds,
    )


def _text_task(layers: int, width: int, lr: float) -> Task:
    return Task(
        data="python",
        build=_llama(layers, width),
        loss=_predict_tokens,
        disturb=_shuffled_tokens,
        optimizer=_ADAMW,
        lr=lr,
        batch=4,
        samples=4096,
        probe_batch=32,
        metric="loss",
        train_slice=slice(None, None, 100),  # the blocks are in the order of files
        clip=1.0,
    )


TASKS = {
    "mnist": _image_task("mnist", [1, 8, 16, 32], 28, lr=0.01, tuning_seeds=3),  # 11 thousand parameters
    "cifar10": _image_task("cifar10", [3, 24, 48, 64], 32, lr=0.01),  # 50 thousand
    "gpt_small": _text_task(2, 64, lr=4e-3),  # 0.4 million
    "gpt_medium": _text_task(3, 128, lr=4e-3),  # 1.1 million
}
