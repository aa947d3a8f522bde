"""What a run leaves behind: ``loss.png`` and the closing summary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ds_pso.metrics import read_metrics
from ds_pso.training.progress import human_bytes


def plot_losses(metrics: Path, image: Path) -> None:
    """Training loss of each particle and held-out loss over steps, sync points marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(metrics)
    syncs = [r for r in records if r["event"] == "sync"]
    # A sync point reports the mean loss since the last one, more often than evaluations do.
    train = syncs or [r for r in records if r["event"] == "train"]
    held_out = [r for r in records if r["event"] == "held_out"]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for particle in range(len(train[0]["losses"]) if train else 0):
        values = [r["losses"][particle] for r in train]
        steps = [r["step"] for r in train]
        axes.plot(steps, values, lw=1, alpha=0.6, color=f"C{particle}", label=f"training, particle {particle}")
    for particle in range(len(held_out[0]["losses"]) if held_out else 0):
        values = [r["losses"][particle] for r in held_out]
        steps = [r["step"] for r in held_out]
        axes.plot(steps, values, "o-", lw=2, ms=4, color=f"C{particle}", label=f"held-out, particle {particle}")
    for index, record in enumerate(syncs):
        label = None if index else "sync points"
        axes.axvline(record["step"], color="0.9", lw=0.6, zorder=0, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Loss of each particle")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=2)
    temporary = image.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, image)


def generate_sample(model: Any, tokenizer: Any, prompt: str, num_tokens: int = 60) -> str:
    """Prompt and continuation, sampled with a fixed seed."""
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
    swarm_bytes: int,
    gradient_bytes: int,
    sync_line: str,
    sample: str,
) -> str:
    """The closing words, as text."""
    lines = ["", f"Held-out loss: {first_loss:.3f} before training, {last_loss:.3f} for the exported model"]
    lines.append(sync_line)
    if swarm_bytes:
        ratio = gradient_bytes / swarm_bytes
        lines.append(
            f"Exchanged between particles: {human_bytes(swarm_bytes)}; synchronous training would have exchanged "
            f"{human_bytes(gradient_bytes)} of gradients in the same steps ({ratio:.1f} x)"
        )
    lines.append(f"Written to {run_dir}/:")
    width = max(len(str(path)) for path in files.values())
    lines += [f"  {path!s:<{width}}  {what}" for what, path in files.items()]
    lines.append("Sample:")
    lines += [f"  {line}" for line in sample.splitlines()]
    return "\n".join(lines)
