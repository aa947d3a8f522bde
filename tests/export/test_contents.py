"""What is written is compared with what ``from_pretrained`` looks for: an error names what is missing or unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ds_pso.errors import UnsupportedError
from ds_pso.export.live import _write
from ds_pso.utils.wrappers import plain_name

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 37}


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """As ``export`` collects it: a shared parameter once, under its first name."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found |= {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {plain_name(model, name): value for name, value in found.items()}


def export(model: nn.Module, folder: Path, *, of_module: bool = False, **changed: torch.Tensor | None) -> None:
    """Write the model; ``changed`` replaces tensors, or leaves them out."""
    tensors = {name: value for name, value in (whole(model) | changed).items() if value is not None}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    folder.mkdir(exist_ok=True)
    _write(model, tensors, trained, folder, holds_all=True, of_module=of_module)


def assert_opens_as(model: nn.Module, folder: Path) -> None:
    opened, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = model.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    for name, value in opened.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model.norm.weight": None}, "would look in vain for model.norm.weight;"),
        ({"model.extra": torch.ones(1)}, "LlamaForCausalLM of the config does not know model.extra;"),
        (
            {"model.norm.weight": None, "model._orig_mod.norm.weight": torch.ones(16)},
            "does not know model._orig_mod.norm.weight would look in vain for model.norm.weight;",
        ),
        ({"model.norm.weight": torch.ones(8)}, "model.norm.weight has the shape [8], and"),
        (
            dict.fromkeys(whole(llama())),
            "q_proj.weight, model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight and 8 more;",
        ),
    ],
    ids=["missing", "stranger", "renamed", "shape", "nothing"],
)
def test_an_error_names_what_differs(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        export(llama(), tmp_path, **changed)
    assert said in str(error.value)


def test_a_layer_that_the_config_does_not_know(tmp_path: Path) -> None:
    model = llama()
    model.reward = nn.Linear(16, 1)
    with pytest.raises(UnsupportedError, match=r"does not know reward\.weight, reward\.bias;"):
        export(model, tmp_path)


def test_a_resized_vocabulary_is_in_the_config_or_refused(tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(40)
    export(model, tmp_path)
    assert_opens_as(model, tmp_path)
    model.lm_head = nn.Linear(16, 50, bias=False)
    with pytest.raises(UnsupportedError, match=r"lm_head.weight has the shape \[50, 16\], .* opens it as \[40, 16\]"):
        export(model, tmp_path / "other")


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_tied_by_hand_is_written_under_both_names(tmp_path: Path, tied: bool) -> None:
    """The config does not tie it, so it is looked for under both."""
    model = llama(tie_word_embeddings=tied)
    model.lm_head.weight = model.model.embed_tokens.weight
    export(model, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert_opens_as(model, tmp_path)


def test_what_the_config_ties_and_the_model_does_not(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(37, 16))
    export(model, tmp_path)
    assert_opens_as(model, tmp_path)


def test_names_that_transformers_changes_in_files(tmp_path: Path) -> None:
    """Experts are one tensor in the model, and many in the file."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3))
    export(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != whole(model).keys()
    assert_opens_as(model, tmp_path)


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "save_pretrained", lambda *given, **more: save(*given, **more, max_shard_size="4KB")
    )
    model = llama()
    export(model, tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert_opens_as(model, tmp_path)

    def loses_one(self: Any, folder: Path, **more: Any) -> None:
        save(self, folder, **more, max_shard_size="4KB")
        (folder / files[1].name).unlink()

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", loses_one)
    with pytest.raises(UnsupportedError, match=r"elements were written instead of \d+; missing "):
        export(model, tmp_path / "other")


class TwoTowers(LlamaForCausalLM):
    """Wants more than its config."""

    def __init__(self, config: LlamaConfig, towers: int) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(nn.Linear(16, 16) for _ in range(towers))


def test_a_class_that_wants_more_than_its_config_is_compared_with_itself(tmp_path: Path) -> None:
    model = TwoTowers(LlamaConfig(**SIZES), 2)
    export(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == whole(model).keys()
    with pytest.raises(UnsupportedError, match=r"would look in vain for towers\.0\.weight"):
        export(model, tmp_path / "other", **{"towers.0.weight": None})


class SavesItsOwn(nn.Linear):
    """As other libraries' models: ``save_pretrained`` takes its own tensors, whatever it is given."""

    def save_pretrained(self, folder: Path, **_: object) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")


def test_what_another_library_would_save_of_its_own_is_not_written(tmp_path: Path) -> None:
    weight = torch.full((2, 2), 7.0)
    export(SavesItsOwn(2, 2), tmp_path, weight=weight)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], weight)


# -- adapters -------------------------------------------------------------------------------


def lora(**more: Any) -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM, **more))


def test_an_adapter_without_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(lora(), tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert name in saved
    model = lora()

    def loses_one(folder: Path, **_: object) -> None:
        save_file({key: value for key, value in saved.items() if key != name}, folder / "adapter_model.safetensors")

    monkeypatch.setattr(model, "save_pretrained", loses_one)
    with pytest.raises(UnsupportedError, match=f"would hold 1 tensors; missing {name}"):
        export(model, tmp_path / "other")


def test_several_adapters_and_layers_beside_them(tmp_path: Path) -> None:
    model = lora(modules_to_save=["lm_head"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    export(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3
    assert len(load_file(tmp_path / "second/adapter_model.safetensors")) == 2


def test_what_was_trained_and_is_in_no_adapter(tmp_path: Path) -> None:
    model = lora()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"would not save what was trained: base_model\.model\.model\.norm"):
        export(model, tmp_path)


def test_prompts_are_those_of_the_module_or_refused(tmp_path: Path) -> None:
    """peft takes them from the module, which holds what its own particle has learned."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(llama(), config)
    export(model, tmp_path, of_module=True)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    with pytest.raises(UnsupportedError, match=r"would not save what was trained: prompt_encoder\.default"):
        export(model, tmp_path / "other")


def test_adapters_that_transformers_has_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *_, **__: None)  # asks for a newer
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    export(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
