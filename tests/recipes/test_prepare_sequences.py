"""``swarm.prepare`` where Accelerate divides sequences over the ranks of a particle, on a small Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.sequence_jobs import SumOverSequence
from pool import Pool
from torch import Tensor
from torch.utils.data import DataLoader
from variants import slow_but

from ds_pso.errors import ConfigError

from .test_prepare import DEEPSPEED

SAMPLES, BATCH, LENGTH, VOCABULARY = 24, 3, 8, 24


def rows() -> list[dict[str, Tensor]]:
    start = torch.randint(VOCABULARY, (SAMPLES, 1), generator=torch.Generator().manual_seed(1))
    tokens = (start + 5 * torch.arange(LENGTH)) % VOCABULARY
    places = torch.arange(LENGTH)
    return [{"input_ids": row, "labels": row, "position_ids": places} for row in tokens]


def loss_of(model: Any, batch: dict[str, Tensor], sequence: int) -> Tensor:
    """Mean cross-entropy of all tokens of the batch that have a next one."""
    if sequence == 1:
        return model(**batch, use_cache=False).loss
    labels = batch.pop("shift_labels")
    logits = model(**batch, use_cache=False).logits
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    averages = model.zero_optimization_stage() == 3
    total = SumOverSequence.apply(total, parallel_state_sp.get_sequence_parallel_group(), sequence if averages else 1)
    return total / (len(labels) * (LENGTH - 1))


def train(sequence: int, stage: int, folder: Path, stop: int | None) -> tuple[list[float], list[np.ndarray], int]:
    """Three epochs of a script; saves after micro batch ``stop`` of all, or goes on from there."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    import ds_pso

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage},
        "swarm": {"particles": 2, "sync_mode": "local_sgd", "sync_interval": 2},
    }
    options: dict[str, Any] = {}
    if sequence > 1:
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length=LENGTH, sp_seq_length_is_variable=False, sp_attn_implementation="sdpa"
        )
        options["parallelism_config"] = ParallelismConfig(sp_size=sequence, sp_backend="deepspeed", sp_handler=handler)
    with ds_pso.init(config) as swarm:
        plugin = DeepSpeedPlugin(hf_ds_config=swarm.ds_config)
        accelerator = Accelerator(deepspeed_plugin=plugin, **options)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", **sizes))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader = DataLoader(rows(), batch_size=BATCH, shuffle=True)
        model, optimizer, loader = swarm.prepare(accelerator, model, optimizer, loader)
        losses = []
        if stop is None:
            accelerator.load_state(str(folder))
        while model.global_steps < 10:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = loss_of(model, batch, sequence)
                    accelerator.backward(loss)
                losses.append(loss.item())
                if model.global_steps == stop:
                    accelerator.save_state(str(folder))
                if model.global_steps == 10:
                    break
        found = [p.detach().numpy().copy() for p in model.module.parameters()] if stage < 3 else []
        return losses, found, swarm.totals.count


@pytest.mark.parametrize("stage", slow_but([2], [0, 2, 3]))
def test_losses_and_weights_are_those_of_whole_sequences(pool: Pool, tmp_path: Path, stage: int) -> None:
    divided = pool.run(train, 2, stage, tmp_path / "divided", 5, env=DEEPSPEED, timeout=120)
    whole = pool.run(train, 1, stage, tmp_path / "whole", 5, world_size=2, env=DEEPSPEED, timeout=120)
    for number, (losses, weights, syncs) in enumerate(divided):
        expected, expected_weights, expected_syncs = whole[number // 2]
        assert losses == pytest.approx(expected, rel=1e-4)
        assert syncs == expected_syncs == 5
        for mine, theirs in zip(weights, expected_weights, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_run_that_is_resumed_in_an_epoch_goes_on_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    straight = pool.run(train, 2, 2, tmp_path, 6, env=DEEPSPEED, timeout=120)
    resumed = pool.run(train, 2, 2, tmp_path, None, env=DEEPSPEED, timeout=120)
    for (losses, weights, _), (expected, expected_weights, _) in zip(resumed, straight, strict=True):
        assert losses == expected[6:]
        for mine, theirs in zip(weights, expected_weights, strict=True):
            np.testing.assert_array_equal(mine, theirs)


# -- the part of a sequence -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_are_those_of_deepspeeds_own_adapter(size: int) -> None:
    from torch.utils.data import default_collate

    from ds_pso.accelerate import SequencePart

    samples = [{**row, "name": "a"} for row in rows()[:3]]
    parts = [SequencePart(default_collate, rank, size)(samples) for rank in range(size)]
    whole = default_collate(samples)
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole[name])
    shifted = torch.cat([part["shift_labels"] for part in parts], 1)
    assert torch.equal(shifted[:, :-1], whole["labels"][:, 1:])
    assert (shifted[:, -1] == -100).all()
    for part in parts:
        assert set(part) == {"input_ids", "position_ids", "shift_labels", "name"}
        assert part["name"] == ["a"] * 3


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"input_ids": torch.ones(2, 4), "labels": torch.ones(2, 4)}, "is a dict with input_ids, labels and"),
        ([torch.ones(2, 4)], "is a dict with input_ids, labels and"),
        ({name: torch.ones(2, 5) for name in ("input_ids", "labels", "position_ids")}, "sequences of 5 tokens"),
    ],
)
def test_batches_that_cannot_be_divided(batch: object, text: str) -> None:
    from ds_pso.accelerate import SequencePart

    with pytest.raises(ConfigError, match=text):
        SequencePart(lambda _: batch, 0, 2)([])
