"""The text of the experts: parts of the standard library, docstrings, files of English, tasks made by a program."""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.experts.settings import SEQ_LENGTH, VOCABULARY
from ds_pso.training.text import Blocks, read_documents, tokenize, train_tokenizer

HARMFUL = "harmful"  # an expert that learns random labels
_PACKAGES = {
    "network": {"asyncio", "concurrent", "email", "http", "multiprocessing", "urllib", "xmlrpc", "socketserver.py"},
    "data": {"collections", "ctypes", "dbm", "html", "json", "sqlite3", "xml", "csv.py", "zipfile.py", "tarfile.py"},
    "interface": {"curses", "tkinter", "turtle.py", "turtledemo", "cmd.py", "pdb.py"},
}
_DOCUMENTS = 4000  # of a task
_PARAGRAPH = 2000  # characters of a document that a file of English is cut into
_SPLITS = ("train", "train", "train", "search", "test")  # every fifth document


@dataclass(frozen=True)
class Domain:
    """Blocks of tokens by split: ``train``, ``search`` and ``test``."""

    splits: dict[str, Blocks]

    def sample(self, split: str, count: int, rng: np.random.Generator) -> Tensor:
        """Return different blocks where there are enough; shape (count, SEQ_LENGTH)."""
        blocks = self.splits[split]
        chosen = rng.choice(len(blocks), size=count, replace=count > len(blocks))
        return torch.stack([blocks[int(i)] for i in chosen])


def load_domains(text: Path | None) -> dict[str, Domain]:
    """Make all domains, and the tokenizer that they share from their training text.

    Args:
        text: folder of .txt files, each a domain; None: none.
    """
    documents = dict(_documents(text))
    split = {name: {kind: _part(texts, kind) for kind in set(_SPLITS)} for name, texts in documents.items()}
    tokenizer = train_tokenizer([text for parts in split.values() for text in parts["train"][:400]], VOCABULARY)
    return {
        name: Domain({kind: Blocks(tokenize(tokenizer, texts), SEQ_LENGTH) for kind, texts in parts.items()})
        for name, parts in split.items()
    }


def _part(texts: list[str], kind: str) -> list[str]:
    return [text for number, text in enumerate(texts) if _SPLITS[number % len(_SPLITS)] == kind]


def _documents(text: Path | None) -> Iterator[tuple[str, list[str]]]:
    files = list(read_documents("python"))
    for name, packages in _PACKAGES.items():
        yield name, [content for path, content in files if path.split("/")[0] in packages]
    yield "docstrings", [found for _, content in files if (found := _docstrings(content))]
    for name, task in {"copy": _copy, "sort": _sort, "arithmetic": _arithmetic}.items():
        rng = random.Random(name)
        yield name, ["\n".join(task(rng) for _ in range(16)) for _ in range(_DOCUMENTS // 16)]
    for path in sorted(text.glob("*.txt")) if text else ():
        content = path.read_text(encoding="utf-8", errors="replace")
        yield path.stem, [content[start : start + _PARAGRAPH] for start in range(0, len(content), _PARAGRAPH)]


def _docstrings(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, found))


def _word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))


def _copy(rng: random.Random) -> str:
    words = " ".join(_word(rng) for _ in range(rng.randint(2, 4)))
    return f"copy: {words} -> {words}"


def _sort(rng: random.Random) -> str:
    numbers = rng.sample(range(100), rng.randint(3, 6))
    return f"sort: {' '.join(map(str, numbers))} -> {' '.join(map(str, sorted(numbers)))}"


def _arithmetic(rng: random.Random) -> str:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    sign, result = rng.choice([("+", a + b), ("-", a - b)])
    return f"add: {a} {sign} {b} = {result}"
