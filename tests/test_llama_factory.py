"""The script of the LLaMA-Factory page, with a stand-in for the two names that it takes from there."""

from __future__ import annotations

import json
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

from pool import Pool
from test_docs import blocks, page
from test_hf_trainer import CONFIG, Numbered, P, S, llama, same, weights

from ds_pso.metrics.log import read_metrics


def stand_in(data: Any) -> list[Any]:
    """Modules under LLaMA-Factory's names; ``run_exp`` does what ``run_sft`` does there. Returns its Trainers."""
    from transformers import Trainer, TrainingArguments

    names = ("llamafactory", "llamafactory.train", "llamafactory.train.sft")
    modules = {name: types.ModuleType(name) for name in (*names, f"{names[2]}.workflow", f"{names[1]}.tuner")}
    workflow, tuner = modules["llamafactory.train.sft.workflow"], modules["llamafactory.train.tuner"]
    made: list[Any] = []

    class CustomSeq2SeqTrainer(Trainer):
        def __init__(self, finetuning_args: Any, processor: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.finetuning_args = finetuning_args

    def run_exp(args: dict[str, Any], callbacks: list[Any] | None = None) -> None:
        keys = {key: value for key, value in args.items() if key not in ("stage", "model_name_or_path")}
        trainer = workflow.CustomSeq2SeqTrainer(  # looked up when it is called, as there
            finetuning_args=args["stage"],
            processor=None,
            model=llama(),
            args=TrainingArguments(report_to="none", disable_tqdm=True, save_strategy="no", **keys),
            train_dataset=data,
            callbacks=callbacks,
        )
        made.append(trainer)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model()

    workflow.CustomSeq2SeqTrainer, tuner.run_exp = CustomSeq2SeqTrainer, run_exp  # type: ignore[attr-defined]
    modules["llamafactory.train.sft"].workflow = workflow  # type: ignore[attr-defined]
    sys.modules.update(modules)
    return made


def run_the_page(script: str, folder: Path) -> dict[str, Any]:
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    os.chdir(folder)
    torch.manual_seed(int(os.environ["RANK"]))  # the swarm makes them alike
    data = Numbered(64)
    made = stand_in(data)
    sys.argv = ["train.py", "sft.yaml"]
    own = folder / f"train_{os.environ['RANK']}.py"
    own.write_text(script, encoding="utf-8")
    runpy.run_path(str(own), run_name="__main__")
    (trainer,) = made
    return {
        "asked": data.asked,
        "weights": weights(trainer.model),
        "stage": trainer.finetuning_args,
        "place": (trainer.args.process_index, trainer.args.world_size),
    }


def test_the_script_of_the_page_makes_particles(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (tmp_path / "sft.yaml").write_text(
        "stage: sft\noutput_dir: out\ndeepspeed: ds_config.json\nper_device_train_batch_size: 4\n"
        "learning_rate: 0.01\nnum_train_epochs: 2\n",
        encoding="utf-8",
    )
    (script,) = blocks(page("docs/llama-factory.md"), "python")
    ranks = pool.run(run_the_page, script, tmp_path, timeout=120)
    assert [(rank["stage"], rank["place"]) for rank in ranks] == [("sft", (i, S)) for i in range(S)] * P
    for epoch in (slice(0, 16), slice(16, 32)):
        assert sorted(index for rank in ranks for index in rank["asked"][epoch]) == list(range(64))
    for rank in ranks:
        same(rank["weights"], ranks[0]["weights"], rtol=0)
    records = [record for record in read_metrics(tmp_path / "out/metrics.jsonl") if record["event"] == "sync"]
    assert [record["step"] for record in records] == [4, 8]
    assert (tmp_path / "out/model.safetensors").is_file()
