"""Makes the data and base models of ``--smoke`` on the spot, on disk as users have theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ds_pso.training.model import build_model, causal_loss
from ds_pso.training.text import train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Rows = dict[str, list[object]]  # columns

_WORDS = tuple(a + b for a in ("ba", "do", "fi", "ku", "le", "mo", "nu", "pa") for b in ("ra", "si", "to", "ven", "xi"))


def make_images(folder: Path, size: int, channels: int) -> None:
    """Make ten classes: a pattern each, a little moved, under noise twice as strong. In Parquet, as the hub has it."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(56, 200, (10, size // 4, size // 4, channels))
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2)

    def rows(count: int) -> Rows:
        labels = rng.integers(10, size=count)
        moved = np.stack([np.roll(patterns[k], rng.integers(-1, 2, size=2), axis=(0, 1)) for k in labels])
        pixels = np.clip(moved + rng.normal(0, 75, moved.shape), 0, 255).astype(np.uint8)
        return {"image": list(pixels.squeeze(-1) if channels == 1 else pixels), "label": labels.tolist()}

    _write(folder, rows(2048), rows(512), image=True)


def make_reviews(folder: Path) -> None:
    """Make sentences of twelve words, of which two or three decide between the two classes."""
    rng = np.random.default_rng(0)
    good, bad, neutral = _WORDS[:8], _WORDS[8:16], _WORDS[16:]

    def sentence(label: int) -> str:
        telling = rng.choice(good if label else bad, size=rng.integers(2, 4)).tolist()
        words = telling + rng.choice(neutral, size=12 - len(telling)).tolist()
        return " ".join(rng.permutation(words))

    def rows(count: int) -> Rows:
        labels = rng.integers(2, size=count).tolist()
        return {"text": [sentence(label) for label in labels], "label": labels}

    _write(folder, rows(4096), rows(512))


def _write(folder: Path, train: Rows, test: Rows, image: bool = False) -> None:
    from datasets import ClassLabel, Dataset, Features, Image, Value, disable_progress_bars

    disable_progress_bars()
    column = {"image": Image()} if image else {"text": Value("string")}
    features = Features({**column, "label": ClassLabel(num_classes=max(train["label"]) + 1)})
    for name, rows in {"train": train, "test": test}.items():
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")


def make_text(folder: Path, language: int = 0) -> None:
    """Make words of which each is followed by one of two, and which two, depends on the language.

    So log 2 nats a word cannot be foretold; a model that knows only how often each word comes needs log 40.
    """
    (folder / "text.txt").write_text("\n".join(_lines(language, 4096)), encoding="utf-8")


def make_mixture(folder: Path, languages: Sequence[int]) -> None:
    """Make words of several languages, in turn after every eight lines."""
    texts = [list(_lines(language, 8192)) for language in languages]
    parts = [text[i : i + 8] for i in range(0, 8192, 8) for text in texts]
    (folder / "text.txt").write_text("\n".join(line for part in parts for line in part), encoding="utf-8")


def _lines(language: int, count: int) -> Iterator[str]:
    rng = np.random.default_rng(language)
    next_words = np.stack([rng.permutation(len(_WORDS)) for _ in range(2)], axis=1)  # (words, 2), all equally frequent
    word = 0
    for choices in rng.integers(2, size=(count, 16)):
        line = []
        for choice in choices:
            word = next_words[word, choice]
            line.append(_WORDS[word])
        yield " ".join(line)


def make_llama(folder: Path) -> None:
    """Make a small Llama that has learned language 0, and its tokenizer."""
    lines = list(_lines(0, 2048))
    tokenizer = train_tokenizer(lines)
    torch.manual_seed(0)
    model: LlamaForCausalLM = build_model("llama:2x64", tokenizer, seq_length=32, ds_config={})
    tokens = torch.tensor(tokenizer("\n".join(lines))["input_ids"])
    blocks = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        loss = causal_loss(model, blocks[torch.arange(16 * step, 16 * step + 16) % len(blocks)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_bert(folder: Path) -> None:
    """Make a small BERT that has learned nothing yet, and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_tokenizer([" ".join(_WORDS)] * 2)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
