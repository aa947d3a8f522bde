"""The Llama that ``llama:<layers>x<width>`` names: its sizes. Free of torch, so that it can be counted without it."""

from __future__ import annotations

from ds_pso.training.arguments import parse_llama

VOCABULARY = 4096  # of the tokenizer that is trained when the model brings none


def llama_sizes(model: str, vocabulary: int = VOCABULARY) -> dict[str, int]:
    """Return the sizes of this model, by their names in a ``transformers`` config.

    Raises:
        ConfigError: the name is not of that form.
    """
    layers, width = parse_llama(model)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
    }
