"""A small training job under DeepSpeed's sequence parallelism (Ulysses), and the same job without it.

Functions here run on the ranks. What differs from ``jobs`` is the model, which attends over a sequence, and the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_pso
from ds_pso.swarm import Swarm

from .jobs import Case, config, parameter_groups, place

ROWS, LENGTH, VOCABULARY = 4, 8, 11  # sequences of a particle's step, tokens of each, different tokens
HEADS, WIDTH = 2, 3  # of attention; elements of a head


def sequence_case(case: Case, particle_size: int, sequence: int) -> Case:
    """The case with groups of ``sequence`` ranks for each sequence."""
    keys: dict[str, Any] = {"train_micro_batch_size_per_gpu": ROWS * sequence // particle_size // case.accumulate}
    if sequence > 1:
        keys["sequence_parallel_size"] = sequence
    return replace(case, deepspeed={**keys, **case.deepspeed})


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of tensors of shape (batch, tokens, heads, width)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class Local(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value)


class Attends(nn.Module):
    """One layer of causal attention; 325 parameters, none of whose sizes is a power of two."""

    def __init__(self, sequence_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.position = nn.Embedding(LENGTH, HEADS * WIDTH)
        self.query, self.key, self.value = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(HEADS * WIDTH)
        self.head = nn.Linear(HEADS * WIDTH, VOCABULARY)
        self._distributed = None
        if sequence_group is not None:
            from deepspeed.sequence.layer import DistributedAttention

            self._distributed = DistributedAttention(Local(), sequence_group, scatter_idx=2, gather_idx=1)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens and their places, shape (batch, tokens of this rank) -> logits, (batch, tokens of it, vocabulary)."""
        x = self.embedding(tokens) + self.position(positions)
        heads = [layer(x).view(*tokens.shape, HEADS, WIDTH) for layer in (self.query, self.key, self.value)]
        attended = causal_attention(*heads) if self._distributed is None else self._distributed(*heads, 0)
        return self.head(self.norm(x + attended.reshape(x.shape)))


class SumOverSequence(torch.autograd.Function):
    """The sum over the ranks of a sequence, each of which has ``factor`` times the gradient of its own part.

    DeepSpeed adds gradients up over these ranks, where the factor is 1 as in Megatron-LM
    (reduce_from_model_parallel_region); but at ZeRO 3, unless ``reduce_scatter`` is false, it takes their mean.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup, factor: int) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        ctx.factor = factor
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * gradients[0], None, None


def samples(particle: int, step: int) -> Tensor:
    """What a particle learns from at a step: tokens, shape (rows, length + 1); noisier for higher particles."""
    generator = torch.Generator().manual_seed(1000 * particle + step)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    tokens = (start + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    noise = torch.rand(tokens.shape, generator=generator) < 0.1 * (particle + 1)
    return torch.where(noise, torch.randint(VOCABULARY, tokens.shape, generator=generator), tokens)


def loss_of(engine: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean cross-entropy of these sequences, shape (rows, length + 1); of each a rank computes its part."""
    inputs, targets, positions = rows[:, :-1], rows[:, 1:], torch.arange(LENGTH).expand(len(rows), LENGTH)
    if group is not None:
        part = LENGTH // dist.get_world_size(group)
        mine = slice(dist.get_rank(group) * part, (dist.get_rank(group) + 1) * part)
        inputs, targets, positions = inputs[:, mine], targets[:, mine], positions[:, mine]
    logits = engine(inputs, positions)
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    if group is not None:
        averages = engine.zero_optimization_stage() == 3 and engine._config.zero_config.reduce_scatter
        total = SumOverSequence.apply(total, group, dist.get_world_size(group) if averages else 1)
    return total / (len(rows) * LENGTH)


def start_groups(sequence: int) -> Any:
    """DeepSpeed's mpu of groups for each sequence; None: whole sequences."""
    if sequence == 1:
        return None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.init_distributed("gloo")
    parallel_state_sp.initialize_sequence_parallel(sequence)
    return parallel_state_sp


def build(case: Case, ds_config: dict[str, Any], mpu: Any, **more: Any) -> tuple[Any, dist.ProcessGroup | None]:
    """An engine, and the group of a sequence."""
    group = None if mpu is None else mpu.get_sequence_parallel_group()
    torch.manual_seed(0 if case.seed is None else case.seed)
    model = Attends(group)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(case, model), config=ds_config, mpu=mpu, **more
    )
    return engine, group


@contextlib.contextmanager
def sequence_swarm(case: Case, sequence: int, *, attach: bool = True, **init: Any) -> Iterator[tuple[Swarm, Any, Any]]:
    """A swarm, its engine, and the group of a sequence."""
    size = place(case)[2]
    with ds_pso.init(config(sequence_case(case, size, sequence), size), **init) as swarm:
        engine, group = build(case, swarm.ds_config, start_groups(sequence))
        if attach:
            swarm.attach(engine)
        yield swarm, engine, group


def train_sequences(
    case: Case,
    sequence: int,
    engine: Any,
    group: Any,
    steps: range | None = None,
    look: Callable[[], None] | None = None,
) -> list[float]:
    """Optimizer steps on the rows of this rank's part of its particle; the losses. ``look`` follows each step."""
    particle, rank, size = place(case)
    parts = size // sequence
    rows = ROWS // parts // case.accumulate
    losses = []
    for step in range(case.steps) if steps is None else steps:
        for micro in range(case.accumulate):
            begin = (micro * parts + rank // sequence) * rows
            loss = loss_of(engine, samples(particle, step)[begin : begin + rows], group)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if look is not None:
            look()
    return losses
