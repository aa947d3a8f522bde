"""A model without memory has the names and the number of parameters of a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from ds_pso import ConfigError
from ds_pso.export.meta_model import load_model_config, num_parameters, skeleton
from ds_pso.training.model import llama_config


def small(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_real_one_without_memory(tied: bool) -> None:
    empty, real = skeleton(small(tied), torch.bfloat16), LlamaForCausalLM(small(tied))
    assert empty.state_dict().keys() == real.state_dict().keys()
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}
    assert num_parameters(empty) == sum(parameter.numel() for parameter in real.parameters())
    # By hand: embedding, per layer attention, MLP and two norms, the last norm, and the head if it is another tensor.
    assert num_parameters(empty) == 37 * 16 * (1 if tied else 2) + 2 * (4 * 16 * 16 + 3 * 16 * 20 + 2 * 16) + 16


def test_the_llama_of_train_py_by_hand() -> None:
    layer = 4 * 128 * 128 + 3 * 128 * 320 + 2 * 128
    assert num_parameters(skeleton(llama_config("llama:4x128", 4096))) == 4096 * 128 + 4 * layer + 128


def test_a_model_that_is_no_language_model_and_names_no_class() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    assert config.architectures is None
    assert num_parameters(skeleton(config)) > 30 * 16


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    for model in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="its config cannot be loaded"):
            load_model_config(model)
