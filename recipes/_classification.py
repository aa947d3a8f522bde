"""Classification for the recipes: data sets with labels, accuracy over all ranks, and a probe batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, default_collate

from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from deepspeed import DeepSpeedEngine

Batch = dict[str, Tensor]
Logits = Callable[[Batch], Tensor]  # shape (N, classes)
Collate = Callable[[list[dict[str, object]]], Batch]


@dataclass(frozen=True)
class Splits:
    """Data sets of the `datasets` library; a row has ``labels`` and the columns that were asked for."""

    train: Dataset
    probe: Dataset  # taken from the training data, and not trained on
    test: Dataset
    num_classes: int


def load_splits(
    swarm: Swarm, dataset: str, columns: Mapping[str, tuple[str, ...]], cache: Path | None = None
) -> Splits:
    """Load a local folder or a hub id, through ``load_dataset``. Called on all ranks.

    Args:
        columns: for each name that a row is to have, those that it may have in the data set.
        cache: where `datasets` keeps what it prepares; None: its own folder.

    Raises:
        ConfigError: it cannot be loaded, or a split or a column is missing.
    """
    with swarm.world.coordinator.agree("loading the data"):
        splits = _load(dataset, cache)
        test = next((name for name in ("test", "validation") if name in splits), None)
        if "train" not in splits or test is None:
            raise ConfigError(
                f"--dataset {dataset}: has the splits {sorted(splits)}, and train and test (or validation) are needed; "
                "rename them, or change the recipe"
            )
        wanted = {**columns, "labels": ("label", "labels")}
        train, held_out = (_choose(dataset, splits[name], wanted) for name in ("train", test))
        order = np.random.default_rng(0).permutation(len(train))
        cut = min(1024, len(train) // 10)
        rest, kept = (train.select(rows, keep_in_memory=True) for rows in (order[cut:], order[:cut]))
        labels = train.features["labels"]
        num_classes = labels.num_classes if hasattr(labels, "num_classes") else max(train["labels"]) + 1
    return Splits(rest, kept, held_out, num_classes)


def _load(dataset: str, cache: Path | None) -> DatasetDict:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, cache_dir=cache and str(cache))
    except Exception as error:  # the library raises many kinds: offline, not found, no such split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--dataset {dataset}: load_dataset failed ({reason}); give a local folder or the id of a dataset"
        ) from error


def _choose(dataset: str, rows: Dataset, wanted: Mapping[str, tuple[str, ...]]) -> Dataset:
    names = {}
    for name, candidates in wanted.items():
        found = next((column for column in candidates if column in rows.column_names), None)
        if found is None:
            raise ConfigError(
                f"--dataset {dataset}: has columns {rows.column_names}, and none is called {candidates[0]}; rename "
                "one, or change the recipe"
            )
        names[found] = name
    return rows.select_columns(list(names)).rename_columns(names)


@torch.no_grad()
def accuracy(
    swarm: Swarm,
    engine: DeepSpeedEngine,
    dataset: Dataset,
    logits: Logits,
    batch_size: int,
    collate: Collate | None = None,
) -> float:
    """Return the part of ``dataset`` that is classified right, each rank of the swarm having looked at its share of it.

    All ranks make as many forward passes, as ZeRO 3 needs it, so fewer than P x S samples at the end are left out.
    Inside ``swarm.consensus()`` it is the accuracy of the consensus. Called on all ranks.
    """
    layout = swarm.world.layout
    each = len(dataset) // layout.world_size
    share = Subset(dataset, range(layout.rank * each, (layout.rank + 1) * each))
    right = 0
    engine.eval()
    for batch in DataLoader(share, batch_size=batch_size, collate_fn=collate):
        right += int((logits(batch).argmax(dim=-1).cpu() == batch["labels"].cpu()).sum())
    engine.train()
    of_particles = swarm.gather(right / each)
    return sum(of_particles) / len(of_particles)


def probe(
    swarm: Swarm,
    engine: DeepSpeedEngine,
    dataset: Dataset,
    logits: Logits,
    batch_size: int,
    collate: Collate | None = None,
) -> Callable[[int], Tensor]:
    """Return the loss on a batch, another at each sync point and the same for all particles; for ``swarm.attach``."""
    layout = swarm.world.layout

    def loss(index: int) -> Tensor:
        begin = (index * layout.particle_size + layout.shard_rank) * batch_size
        rows = [dataset[i % len(dataset)] for i in range(begin, begin + batch_size)]
        batch = (collate or default_collate)(rows)
        engine.eval()
        value = F.cross_entropy(logits(batch).float(), batch["labels"].to(engine.device))
        engine.train()
        return value

    return loss
