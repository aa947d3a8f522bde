"""A model that replaces another in its folder: at any moment one of the two is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_pso.utils.model_folder import replacing_model

SINGLE, TWO, FIVE = "1GB", "24KB", "12KB"  # the longest file


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, tie_word_embeddings=False, **shape))


def write(model: LlamaForCausalLM, folder: Path, longest: str) -> None:
    with replacing_model(folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=longest)


def same(model: LlamaForCausalLM, other: LlamaForCausalLM) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Failing:
    """Lets so many moves into a folder, or removals from it, succeed, and then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, count: int) -> None:
        self.folder, self.left = folder, count
        for where, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(where, name, self._counted(getattr(where, name)))

    def _counted(self, call: Any) -> Any:
        def counted(*paths: Any, **options: Any) -> Any:
            if Path(paths[-1]).parent == self.folder:
                self.left -= 1
                if self.left < 0:
                    raise OSError(28, "No space left on device")
            return call(*paths, **options)

        return counted


@pytest.mark.parametrize(
    ("before", "after"), [(SINGLE, SINGLE), (SINGLE, TWO), (TWO, SINGLE), (TWO, FIVE), (FIVE, TWO)]
)
def test_one_of_the_two_loads_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    old, new, fresh = llama(0), llama(1), tmp_path / "fresh"
    write(new, fresh, after)
    assert len(list(fresh.glob("model-*"))) == {SINGLE: 0, TWO: 2, FIVE: 5}[after]
    for count in range(30):
        folder = tmp_path / f"model_{count}"
        write(old, folder, before)
        with monkeypatch.context() as patch:
            Failing(patch, folder, count)
            try:
                write(new, folder, after)
            except OSError:
                done = False
            else:
                done = True
        loaded = LlamaForCausalLM.from_pretrained(folder)
        assert same(loaded, new) or (same(loaded, old) and not done), count
        assert f".{folder.name}.tmp" not in names(tmp_path)
        if done:
            break
    assert done
    assert count >= len(names(fresh)), "every file was the one that failed, once"
    assert names(folder) == names(fresh), "nothing is left of the old one"


def test_what_is_not_of_the_model_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(llama(0), folder, FIVE)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / ".model.tmp").mkdir()  # left by an export that was killed
    (tmp_path / ".model.tmp" / "model-00009-of-00009.safetensors").write_text("half")
    write(llama(1), folder, SINGLE)
    assert names(folder) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    assert names(tmp_path) == ["model"]


def test_an_error_while_writing_leaves_the_old_model(tmp_path: Path) -> None:
    folder, old = tmp_path / "model", llama(0)
    write(old, folder, TWO)
    before = names(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("full")

    new = llama(1)
    new.config.save_pretrained = fail
    with pytest.raises(OSError, match="full"):
        write(new, folder, TWO)
    assert names(folder) == before
    assert same(LlamaForCausalLM.from_pretrained(folder), old)
