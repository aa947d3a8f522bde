"""Images for the recipes: loading, scaling, and augmentation without torchvision."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

import _common as recipe
import _smoke_data as smoke
import torch
from _classification import Splits, load_splits
from torch import Tensor
from torch.nn import functional as F

from ds_pso.swarm import Swarm

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_images(swarm: Swarm, arguments: argparse.Namespace, *, size: int, channels: int) -> Splits:
    """Load rows of ``pixels``, uint8 of shape (channels, height, width), decoded when asked for, and ``labels``.

    Those of ``--dataset``, or under ``--smoke`` made here, of this size. Called on all ranks.
    """
    dataset, cache = arguments.dataset, None
    if arguments.smoke:
        made, cache = arguments.output_dir / "made", arguments.output_dir / "cache"
        dataset = recipe.make_once(swarm, made, lambda folder: smoke.make_images(folder, size, channels))
    splits = load_splits(swarm, dataset, {"pixels": ("image", "img")}, cache)
    parts = {name: getattr(splits, name).with_format("torch") for name in ("train", "probe", "test")}
    return replace(splits, **parts)


def to_input(pixels: Tensor, engine: DeepSpeedEngine) -> Tensor:
    """Scale uint8 of any shape to numbers around 0 with a spread of about 1, on the model's device, in its dtype."""
    dtype = next(engine.module.parameters()).dtype
    return ((pixels.to(engine.device).float() - 128) / 64).to(dtype)


def augment(pixels: Tensor, shift: int = 4) -> Tensor:
    """Mirror each image or not, and move it by up to ``shift`` pixels; shape (N, channels, height, width)."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1, 1))  # on the CPU: the same for any device
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    columns = torch.where(torch.rand(count, 1, 1) < 0.5, columns, columns.flip(-1))
    return padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
