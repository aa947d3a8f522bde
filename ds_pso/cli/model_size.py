"""The number of parameters of a model, from its config alone. Torch is imported only where the config needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ds_pso.training.llama import llama_sizes

_BUILT_LIKE_LLAMA = {"llama": False, "mistral": False, "qwen2": True}  # model_type; whether queries have biases


def count_parameters(model: str) -> int:
    """Return the number of parameters; tied ones count once.

    Args:
        model: ``llama:<layers>x<width>``, a local folder with a ``config.json``, or a hub id.

    Raises:
        ConfigError: there is no config, or none that transformers knows.
    """
    if model.startswith("llama:"):
        return _decoder_size(llama_sizes(model), tied=True, biases=False)
    return _count_config(_local_config(model)) or _count_with_transformers(model)


def _local_config(model: str) -> Mapping[str, object]:
    try:
        found = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # perhaps a hub id; what is wrong is said by transformers
        return {}
    return found if isinstance(found, dict) else {}


def _count_config(config: Mapping[str, object]) -> int | None:
    """Count a model that is built like Llama; None: it is none, or its config leaves something open."""
    biases, tied = _BUILT_LIKE_LLAMA.get(str(config.get("model_type"))), config.get("tie_word_embeddings")
    if biases is None or not isinstance(tied, bool) or config.get("attention_bias") or config.get("mlp_bias"):
        return None
    sizes = {name: value for name, value in config.items() if isinstance(value, int)}
    if not llama_sizes("llama:1x32").keys() <= sizes.keys():
        return None
    return _decoder_size(sizes, tied=tied, biases=biases)


def _decoder_size(sizes: Mapping[str, int], *, tied: bool, biases: bool) -> int:
    """Count attention, gated MLP and norms of each layer, the last norm, and the embeddings at both ends."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", width // sizes["num_attention_heads"])
    queries, keys = head * sizes["num_attention_heads"], head * sizes["num_key_value_heads"]
    attention = 2 * width * queries + 2 * width * keys + (queries + 2 * keys if biases else 0)
    layer = attention + 3 * width * inner + 2 * width
    return sizes["num_hidden_layers"] * layer + width + (1 if tied else 2) * sizes["vocab_size"] * width


def _count_with_transformers(model: str) -> int:
    # Accelerate imports DeepSpeed, which says on stdout that it looks for a GPU. Nothing is computed here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ds_pso.export.meta_model import load_model_config, num_parameters, skeleton

    return num_parameters(skeleton(load_model_config(model)))
