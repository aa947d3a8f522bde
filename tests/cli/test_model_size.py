"""Parameters counted by hand, against transformers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from ds_pso.cli import model_size
from ds_pso.cli.model_size import count_parameters
from ds_pso.errors import ConfigError
from ds_pso.export.meta_model import num_parameters, skeleton
from ds_pso.training.model import llama_config

SIZES = {
    "vocab_size": 37,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("model", ["llama:1x32", "llama:4x128", "llama:7x96"])
def test_a_llama_by_its_name(model: str) -> None:
    assert count_parameters(model) == num_parameters(skeleton(llama_config(model, 4096)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"head_dim": 24}])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
def test_a_folder_without_transformers(tmp_path: Path, monkeypatch: Any, kind: Any, more: Any, tied: bool) -> None:
    config = kind(**SIZES, **more, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    expected = num_parameters(skeleton(config))
    monkeypatch.setattr(model_size, "_count_with_transformers", lambda model: pytest.fail("was not needed"))
    assert count_parameters(str(tmp_path)) == expected


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=37),
        LlamaConfig(**SIZES, attention_bias=True),
        LlamaConfig(**SIZES, mlp_bias=True),
    ],
    ids=["another kind", "biases of attention", "biases of the MLP"],
)
def test_what_is_not_counted_by_hand(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    assert count_parameters(str(tmp_path)) == num_parameters(skeleton(config))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "none of these"}'])
def test_a_config_that_says_too_little_is_left_to_transformers(tmp_path: Path, monkeypatch: Any, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(model_size, "_count_with_transformers", lambda model: 7)
    assert count_parameters(str(tmp_path)) == 7


def test_no_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .*: its config cannot be loaded") as error:
        count_parameters(str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="llama:<layers>x<width> with a width that 32 divides"):
        count_parameters("llama:4x100")
