"""The data of the tasks, in memory, each cut into the same four splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_pso import Swarm
from ds_pso.training.text import Blocks, load_corpus

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SEQ_LENGTH = 64
HUB_IDS = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}

Split = tuple[Tensor, ...]  # tensors with the same first dimension, one row per sample


@dataclass(frozen=True)
class Data:
    """Tuning looks at ``validation``, the rules that score weights at ``probe``, the tables at ``test``."""

    train: Split
    probe: Split
    validation: Split
    test: Split
    tokenizer: Any = None


_loaded: dict[str, Data] = {}


def load(swarm: Swarm, name: str, folder: Path | None) -> Data:
    """The data called ``name``, prepared once per disk and read once per process; call it on all ranks.

    Args:
        name: ``mnist``, ``cifar10``, or ``python``: the source code of the standard library.
        folder: holds ``mnist`` and ``cifar10`` as the hub lays them out; None: load them from the hub.
    """
    if name not in _loaded:  # on none of the ranks: what follows waits for all of them
        data = _load_text(swarm, name) if name == "python" else _load_images(swarm, name, folder)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        splits = {key: getattr(data, key) for key in ("train", "probe", "validation", "test")}
        _loaded[name] = replace(data, **{key: tuple(t.to(device) for t in split) for key, split in splits.items()})
    return _loaded[name]


def take(split: Split, rows: Tensor | slice | list[int]) -> Split:
    """The samples in these rows."""
    return tuple(tensor[rows] for tensor in split)


def _load_images(swarm: Swarm, name: str, folder: Path | None) -> Data:
    """Splits of (images, uint8 of shape (N, channels, height, width); labels, int64 of shape (N,))."""
    file = CACHE / f"{name}.safetensors"
    leads = swarm.world.coordinator.leads_disk(CACHE)
    with swarm.world.coordinator.agree("preparing the images"):
        if leads and not file.exists():
            _prepare_images(file, str(folder / name) if folder else HUB_IDS[name])
    arrays = load_file(file)
    train = (arrays["train_images"], arrays["train_labels"])
    return Data(
        train=take(train, slice(-6000)),
        probe=take(train, slice(-6000, -5000)),
        validation=take(train, slice(-5000, None)),
        test=(arrays["test_images"], arrays["test_labels"]),
    )


def _prepare_images(file: Path, source: str) -> None:
    from datasets import load_dataset

    arrays = {}
    for split, rows in load_dataset(source).items():
        column = next(c for c in ("image", "img") if c in rows.column_names)
        images = np.stack([np.atleast_3d(np.asarray(image)) for image in rows[column]])
        arrays[f"{split}_images"] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        arrays[f"{split}_labels"] = torch.tensor(rows["label"])
    temporary = file.with_suffix(".tmp")
    save_file(arrays, temporary)
    temporary.replace(file)


def _load_text(swarm: Swarm, name: str) -> Data:
    """Splits of (token ids, int64 of shape (N, SEQ_LENGTH),)."""
    corpus = load_corpus(swarm, name, CACHE / name, SEQ_LENGTH)
    held_out = _stack(corpus.held_out)
    # Shuffled, so that the splits are of the same documents and not of the first, the middle and the last ones.
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
    return Data(
        train=(_stack(corpus.train),),
        probe=(held_out[:512],),
        validation=(held_out[512:1536],),
        test=(held_out[1536:2560],),
        tokenizer=corpus.tokenizer,
    )


def _stack(blocks: Blocks) -> Tensor:
    return torch.stack([blocks[i] for i in range(len(blocks))])
