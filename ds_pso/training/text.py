"""Makes blocks of tokens from text: documents, a byte-level BPE trained on the spot, packing."""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm
from ds_pso.training.llama import VOCABULARY
from ds_pso.utils.atomic_io import open_atomically, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
_HELD_OUT = 20  # one document in this many is held out
_TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst", ".text"}


class Blocks(Dataset[Tensor]):
    """Consecutive blocks of ``seq_length`` tokens; each item has shape (seq_length,), int64."""

    def __init__(self, tokens: np.ndarray, seq_length: int) -> None:
        self._tokens, self._seq_length = tokens, seq_length

    def __len__(self) -> int:
        return len(self._tokens) // self._seq_length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = self._tokens[index * self._seq_length : (index + 1) * self._seq_length]
        return torch.from_numpy(block.astype(np.int64))


@dataclass
class Corpus:
    """Training and held-out blocks, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    train: Blocks
    held_out: Blocks


def load_corpus(
    swarm: Swarm,
    dataset: str,
    folder: Path,
    seq_length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: int = VOCABULARY,
) -> Corpus:
    """Tokenise ``dataset`` into ``folder``, once per disk, and map it into memory on every rank.

    Args:
        tokenizer: the model's own; if None, a byte-level BPE is trained on the training documents.
        vocabulary: tokens of that one.

    Raises:
        ConfigError: the dataset cannot be found or is too small.
    """
    from transformers import AutoTokenizer

    leads = swarm.world.coordinator.leads_disk(folder)
    with swarm.world.coordinator.agree("preparing the data"):
        if leads:
            _prepare_once(dataset, folder, tokenizer, vocabulary)
    splits = []
    with swarm.world.coordinator.agree("reading the data"):
        for name in ("train", "held_out"):
            blocks = Blocks(np.load(folder / f"{name}.npy", mmap_mode="r"), seq_length)
            if not len(blocks):
                raise ConfigError(
                    f"--dataset {dataset}: the {name} part is shorter than one block of --seq_length {seq_length} "
                    "tokens; use more text or a shorter sequence"
                )
            splits.append(blocks)
    return Corpus(tokenizer or AutoTokenizer.from_pretrained(folder / "tokenizer"), *splits)


def _prepare_once(dataset: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    """Prepare the data, or find it prepared from the same source when a run is resumed."""
    source = {"dataset": dataset, "tokenizer": tokenizer.name_or_path if tokenizer else f"BPE {vocabulary}"}
    done = folder / "source.json"
    if not done.exists():
        _prepare(dataset, folder, tokenizer, vocabulary)
        write_atomically(done, json.dumps(source))
        log.info("%s: prepared from %s", folder, source)
        return
    before = json.loads(done.read_text(encoding="utf-8"))
    for key, value in source.items():
        if before[key] != value:
            raise ConfigError(
                f"{folder}: was prepared with {key} {before[key]!r}, and this run asks for {value!r}; "
                "resume with what the run began with, or give another --output_dir"
            )
    log.info("%s: was prepared before", folder)


def _prepare(dataset: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    documents = list(read_documents(dataset))
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for name, text in documents:
        # By hash, so that a document stays on its side when others are added.
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT == 0
        parts["held_out" if held_out else "train"].append(text)
    if not parts["train"] or not parts["held_out"]:
        parts = _split_by_length([text for _, text in documents])
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = train_tokenizer(parts["train"], vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("train", "held_out"):
        tokens = tokenize(tokenizer, parts[name])
        with open_atomically(folder / f"{name}.npy") as file:
            np.save(file, tokens)


def _split_by_length(texts: list[str]) -> dict[str, list[str]]:
    """Hold out the end of the text, where there are too few documents to hold some out."""
    text = "\n".join(texts)
    cut = len(text) - len(text) // _HELD_OUT
    return {"train": [text[:cut]], "held_out": [text[cut:]]}


def read_documents(dataset: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document, in a fixed order."""
    path = Path(dataset)
    if dataset == "python":
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"}
        files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
        yield from _read_files(root, files)
    elif path.is_file():
        yield from _read_files(path.parent, [path])
    elif path.is_dir() and any(p.suffix in _TEXT_SUFFIXES for p in path.rglob("*")):
        yield from _read_files(path, sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES))
    else:
        yield from _read_hub(dataset)


def _read_files(root: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8", errors="replace")


def _read_hub(dataset: str) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset, split="train")
    except Exception as error:  # the library raises many kinds: offline, not found, no such split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--dataset {dataset}: not a text file or folder here, and load_dataset failed ({reason}); "
            "check the path or the dataset id"
        ) from error
    column = next((c for c in ("text", "content", "document") if c in rows.column_names), None)
    if column is None:
        raise ConfigError(
            f"--dataset {dataset}: has columns {rows.column_names}, and none is called text; rename one, or give a "
            "text file or folder"
        )
    for index, text in enumerate(rows[column]):
        yield str(index), text


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the training documents alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Put all documents in one row of token ids, each followed by the end-of-text token, if there is one."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids.extend(encoded)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return np.asarray(ids, dtype=np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
