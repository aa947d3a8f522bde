"""The config that is saved with a checkpoint: only of Hugging Face models, and saving never fails for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_pso.checkpoint.saving import save_model_config


class HubMixin(nn.Linear):
    """Of another library: it saves itself, and has no config."""

    def save_pretrained(self, folder: Path) -> None: ...


class Diffuser(HubMixin):
    config: ClassVar = {"in_channels": 4}


class Configured(nn.Linear):
    config = LlamaConfig()


def save(module: nn.Module, folder: Path, shard_rank: int = 0) -> list[str]:
    swarm: Any = SimpleNamespace(
        engine=SimpleNamespace(module=module), world=SimpleNamespace(layout=SimpleNamespace(shard_rank=shard_rank))
    )
    save_model_config(swarm, folder / "model")
    return sorted(path.name for path in folder.glob("model/*"))


@pytest.mark.parametrize("kind", [nn.Linear, HubMixin, Diffuser, Configured])
def test_other_modules_have_none(tmp_path: Path, kind: type[nn.Linear]) -> None:
    assert save(kind(2, 2), tmp_path) == []
    assert not (tmp_path / "model").exists()


def test_the_first_rank_saves_it_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    assert save(model, tmp_path, shard_rank=1) == []
    assert save(model, tmp_path) == ["config.json", "generation_config.json"]
    assert json.loads((tmp_path / "model/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert model.config.architectures is None
