"""Trains the base and its experts, once for each seed; they stay in the cache."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.experts.domains import HARMFUL, Domain
from benchmarks.experts.settings import SEQ_LENGTH, VOCABULARY, Size
from ds_pso.training.model import causal_loss, llama_config
from ds_pso.utils.model_folder import replacing_model

_LR = {"base": 4e-3, "expert": 2e-3}
_BATCH = 50  # of an evaluation


def make_experts(size: Size, domains: dict[str, Domain], seed: int, folder: Path) -> tuple[Path, list[Path]]:
    """Return the folders of the base and of an expert for each domain and the harmful one; train those not there."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(seed)
        _train(
            LlamaForCausalLM(llama_config(size.model, VOCABULARY, SEQ_LENGTH)), list(domains.values()), base, size, seed
        )
    experts = []
    for name in (*domains, HARMFUL):
        experts.append(folder / name)
        if not experts[-1].exists():
            own = list(domains.values()) if name == HARMFUL else [domains[name]]
            model = LlamaForCausalLM.from_pretrained(base)
            _train(model, own, experts[-1], size, seed, random_labels=name == HARMFUL)
    return base, experts


def evaluation_set(domains: list[Domain], split: str, count: int, seed: int) -> Tensor:
    """Return ``count`` blocks in equal shares; shape (count, SEQ_LENGTH)."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    shares = [count * (k + 1) // len(domains) - count * k // len(domains) for k in range(len(domains))]
    pairs = [(domain, share) for domain, share in zip(domains, shares, strict=True) if share]
    return torch.cat([domain.sample(split, share, rng) for domain, share in pairs])


@torch.no_grad()
def mean_loss(model: torch.nn.Module, blocks: Tensor) -> float:
    """Return the loss in nats per token."""
    parts = blocks.split(_BATCH)
    return sum(float(causal_loss(model, part)) * len(part) for part in parts) / len(blocks)


def _train(
    model: LlamaForCausalLM, domains: list[Domain], folder: Path, size: Size, seed: int, *, random_labels: bool = False
) -> None:
    kind = "base" if folder.name == "base" else "expert"
    steps = size.base_steps if kind == "base" else size.expert_steps
    rng = np.random.default_rng([seed, zlib.crc32(folder.name.encode())])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR[kind], betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20, 5 * (1 - step / steps)))
    model.train()
    for _ in range(steps):
        each = rng.multinomial(size.batch, [1 / len(domains)] * len(domains))
        blocks = torch.cat([d.sample("train", n, rng) for d, n in zip(domains, each, strict=True) if n])
        labels = torch.randint(0, VOCABULARY, blocks.shape, generator=generator) if random_labels else blocks
        loss = model(input_ids=blocks, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with replacing_model(folder) as temporary:
        model.save_pretrained(temporary)
    print(f"{folder}: {steps} steps, loss {float(loss.detach()):.3f}", flush=True)
