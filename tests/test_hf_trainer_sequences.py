"""The HF Trainer as a particle whose sequences are divided over its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from test_hf_trainer import CONFIG, Numbered, a_trainer, joined, same, weights

SEQUENCES = {**CONFIG, "swarm": {"particles": 2, "sync_mode": "diloco", "sync_interval": 4}}


class Placed(Numbered):
    """Sequences whose tokens know their places, as collators of packed sequences make them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "position_ids": torch.arange(8)}


def train_divided(folder: Path, sequence: int, stop: int | None, resume: bool) -> dict[str, Any]:
    """A training of 16 steps, which stops after ``stop`` of them, or goes on from there."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig
    from transformers import TrainerCallback

    losses: list[float] = []

    class Follow(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True

    options: dict[str, Any] = {}
    if sequence > 1:
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length=8, sp_seq_length_is_variable=False, sp_attn_implementation="sdpa"
        )
        options["parallelism_config"] = ParallelismConfig(sp_size=sequence, sp_backend="deepspeed", sp_handler=handler)
    data = Placed(64)
    with joined(SEQUENCES, folder) as swarm:
        trainer = a_trainer(swarm, folder, data=data, callbacks=[Follow()], logging_steps=1, seed=1, **options)
        trainer.train(resume_from_checkpoint=resume)
        return {"losses": losses, "asked": data.asked, "weights": weights(trainer.model), "syncs": swarm.totals.count}


def test_the_losses_are_those_of_whole_sequences(pool: Pool, tmp_path: Path) -> None:
    divided = pool.run(train_divided, tmp_path / "divided", 2, None, False, timeout=120)
    whole = pool.run(train_divided, tmp_path / "whole", 1, None, False, world_size=2, timeout=120)
    for number, rank in enumerate(divided):
        expected = whole[number // 2]
        assert rank["asked"] == expected["asked"]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert rank["syncs"] == expected["syncs"] == 4
        same(rank["weights"], expected["weights"], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_a_training_that_is_resumed_in_an_epoch_ends_where_the_whole_one_does(pool: Pool, tmp_path: Path) -> None:
    whole = pool.run(train_divided, tmp_path / "whole", 2, None, False, timeout=120)
    pool.run(train_divided, tmp_path / "parts", 2, 3, False, timeout=120)
    parts = pool.run(train_divided, tmp_path / "parts", 2, None, True, timeout=120)
    for rank, expected in zip(parts, whole, strict=True):
        assert rank["losses"] == expected["losses"][3:]
        same(rank["weights"], expected["weights"], rtol=0, atol=0)
