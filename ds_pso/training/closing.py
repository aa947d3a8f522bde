"""The end of a run on a terminal: a sample of what was learned, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ds_pso.utils.units import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int = 60
) -> str:
    """Return the prompt and how the model goes on, sampled with a fixed seed."""
    import torch

    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=True, top_k=20, temperature=0.8)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def summary(
    *,
    run_dir: Path,
    files: dict[str, Path],
    first_loss: float,
    last_loss: float,
    sync_mode: str,
    swarm_bytes: int,
    gradient_bytes: int,
    sync_line: str,
    sample: str,
) -> str:
    """Return the text that ends a run."""
    lines = ["", f"Held-out loss: {first_loss:.3f} before training, {last_loss:.3f} for the exported model"]
    lines.append(sync_line)
    if swarm_bytes:
        ratio = gradient_bytes / swarm_bytes
        lines.append(
            f"Exchanged between particles: {human_bytes(swarm_bytes)}; synchronous training would have exchanged "
            f"{human_bytes(gradient_bytes)} of gradients in the same steps ({ratio:.1f} x)"
        )
        lines.append(
            f'Another way to combine particles is one word in the config, "sync_mode" (here "{sync_mode}"); '
            "what each costs in bytes and in loss: docs/sync-modes.md"
        )
    lines.append(f"Written to {run_dir}/:")
    width = max(len(str(path)) for path in files.values())
    lines += [f"  {path!s:<{width}}  {what}" for what, path in files.items()]
    lines.append("Sample:")
    lines += [f"  {line}" for line in sample.splitlines()]
    return "\n".join(lines)
