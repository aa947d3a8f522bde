"""A Hugging Face model without memory, made from its config alone: its names, shapes and way of saving itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import torch
import transformers

from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel


def load_model_config(model: str | Path) -> transformers.PretrainedConfig:
    """Return the ``transformers`` config of a local folder or hub id. No code of a model is run.

    Raises:
        ConfigError: there is none, or its type is not one of transformers'.
    """
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model {model}: its config cannot be loaded ({reason}); give llama:<layers>x<width>, a local folder, a "
            "hub id, or instead --parameters"
        ) from error


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Return the model of this config, on the meta device.

    The class is the one that the config names, or the one for causal language models, or the bare one.

    Raises:
        ConfigError: transformers has no model of this kind.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if named is None and type(config) in auto._model_mapping:
            named = auto._model_mapping[type(config)]
    if named is None:
        raise ConfigError(
            f"transformers has no model for a {type(config).__name__}; give the number of its --parameters instead"
        )
    with accelerate.init_empty_weights():
        model = named(config)
    model.tie_weights()  # what moved to the meta device one by one is tied no longer
    return model.to(dtype)


def with_adapter(model: transformers.PreTrainedModel, folder: Path) -> PeftModel:
    """Return the peft model around it, as the adapter_config.json in this folder has it."""
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    model.name_or_path = config.base_model_name_or_path  # not the folder of the skeleton's config
    with accelerate.init_empty_weights():
        return peft.get_peft_model(model, config)


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
