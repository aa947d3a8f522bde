"""LoRA adapters of peft: only they are trained and travel, and what is exported opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ds_pso

from .jobs import Case, config, working_weights


def train_adapters(stage: int, base: Path, folder: Path) -> dict[str, Any]:
    with ds_pso.init(config(Case(stage=stage), 2)) as swarm:
        torch.manual_seed(swarm.particle)  # particles would begin with different adapters
        adapters = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in trained)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=swarm.ds_config)
        swarm.attach(engine)
        for _ in range(3):  # they sync after the second
            tokens = torch.randint(50, (4, 8))
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()
        swarm.export(folder)
        return {"weights": working_weights(engine), "elements": elements, "bytes": swarm.total_bytes()}


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_exported_adapters_are_the_mean_of_the_particles(pool, tmp_path, stage):
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))
    base.save_pretrained(tmp_path / "base")
    ranks = pool.run(train_adapters, stage, tmp_path / "base", tmp_path / "adapters")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = dict(PeftModel.from_pretrained(again, tmp_path / "adapters").named_parameters())
    names = [name for name in opened if "lora_" in name]
    assert len(names) == 14  # two for each of seven linear layers
    for name in names:
        first, second = (ranks[rank]["weights"][name] for rank in (0, 2))
        np.testing.assert_allclose(opened[name].detach().numpy(), (first + second) / 2, atol=1e-6, err_msg=name)
        assert not np.allclose(first, second, atol=1e-4), f"{name}: not trained since they met"
    for rank in ranks:
        np.testing.assert_array_equal(
            rank["weights"]["base_model.model.model.embed_tokens.weight"],
            base.model.embed_tokens.weight.detach().numpy(),
        )
        # Each of four ranks receives 8 N (P - 1) / P bytes of its N elements, half of those of a particle and padding.
        assert 8 * rank["elements"] <= rank["bytes"] < 8.5 * rank["elements"] + 1024
