"""The text that is trained on, and the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.minutes.settings import SEQ_LENGTH, TEXT, VOCABULARY
from ds_pso.training.text import Blocks, Corpus, load_corpus

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CACHE = Path(__file__).resolve().parents[1] / ".cache" / f"levers_{TEXT}_{VOCABULARY}"  # the same text as there


def prepare_text(dataset: str = TEXT, folder: Path = CACHE) -> None:
    """Train the tokenizer and encode the text into ``folder``, unless it lies there."""
    if not (folder / "source.json").exists():
        import ds_pso

        config = {"train_micro_batch_size_per_gpu": 1, "swarm": {"particles": 1, "sync_mode": "allreduce"}}
        ds_pso.simulate(config, lambda swarm: load_corpus(swarm, dataset, folder, SEQ_LENGTH, vocabulary=VOCABULARY))


def load_text(folder: Path) -> Corpus:
    """The text that ``prepare_text`` has put there."""
    from transformers import AutoTokenizer

    parts = [Blocks(np.load(folder / f"{name}.npy", mmap_mode="r"), SEQ_LENGTH) for name in ("train", "held_out")]
    return Corpus(AutoTokenizer.from_pretrained(folder / "tokenizer"), *parts)


def build_llama(model: str, corpus: Corpus, seed: int) -> LlamaForCausalLM:
    """A Llama, ``llama:<layers>x<width>``; equal seeds give equal weights."""
    from ds_pso.training.model import build_model

    torch.manual_seed(seed)
    return build_model(model, corpus.tokenizer, SEQ_LENGTH, {})


def batches(blocks: Blocks, batch: int, seed: int, rank: int = 0, num_ranks: int = 1) -> Iterator[Tensor]:
    """Token ids (batch, SEQ_LENGTH) of the part of this rank, in another order in each epoch, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        mine = torch.randperm(len(blocks), generator=generator).tolist()[rank::num_ranks]
        for start in range(0, len(mine) - batch + 1, batch):
            yield torch.stack([blocks[i] for i in mine[start : start + batch]])


@torch.no_grad()
def mean_loss(model: nn.Module, blocks: Blocks, rows: list[int], batch: int = 32) -> float:
    """Next-token cross-entropy in nats, over these blocks."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch):
        ids = torch.stack([blocks[i] for i in rows[start : start + batch]])
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids)
    return total / len(rows)
