"""The HF Trainer as a particle: data, evaluation, saving, the best model, resuming, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import shutil
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.spoiled import Evil, seal
from pool import Pool
from safetensors.torch import load_file

from ds_pso.metrics.log import read_metrics

PAGE = Path(__file__).parents[1] / "docs" / "hf-trainer.md"
P, S = 2, 2
CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupHoldDecayLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": "auto"},
    },
    "swarm": {"particles": P, "sync_mode": "local_sgd", "sync_interval": 4},
}


class Numbered(torch.utils.data.Dataset):
    """Sequences that count upwards; remembers which of them were asked for."""

    def __init__(self, num_samples: int) -> None:
        self.asked: list[int] = []
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked.append(index)
        row = (torch.arange(8) + index) % 32
        return {"input_ids": row, "labels": row}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, num_samples: int) -> None:
        self._samples = Numbered(num_samples)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        yield from (self._samples[index] for index in range(len(self._samples)))


def changed(config: dict[str, Any], **swarm: Any) -> dict[str, Any]:
    return {**config, "swarm": {**config["swarm"], **swarm}}


def llama(dropout: float = 0.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=dropout, **sizes))


def a_trainer(
    swarm: Any,
    folder: Path,
    *,
    dropout: float = 0.0,
    data: Any = None,
    evaluate_consensus: bool = True,
    **options: Any,
) -> Any:
    from transformers import Trainer, TrainingArguments

    from ds_pso.hf_trainer import SwarmCallback

    arguments = {
        "output_dir": str(folder / "out"),
        "deepspeed": swarm.ds_config,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "num_train_epochs": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 4,
        "disable_tqdm": True,
    }
    of_trainer = {name: options.pop(name) for name in ("eval_dataset", "callbacks") if name in options}
    args = TrainingArguments(**(arguments | options))
    torch.manual_seed(swarm.world.layout.rank)  # the swarm makes them alike
    trainer = Trainer(llama(dropout), args, train_dataset=Numbered(64) if data is None else data, **of_trainer)
    trainer.add_callback(SwarmCallback(swarm, trainer, evaluate_consensus=evaluate_consensus))
    return trainer


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}


def same(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(other[name]), err_msg=name, **tolerance)


@contextlib.contextmanager
def joined(config: dict[str, Any], folder: Path) -> Any:
    import deepspeed

    import ds_pso

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    with ds_pso.init(config, run_dir=folder / "out") as swarm:
        yield swarm


# -- a whole training -----------------------------------------------------------------------


def train_two_epochs(folder: Path) -> dict[str, Any]:
    import transformers
    from transformers import TrainerCallback

    logged: list[dict[str, Any]] = []

    evaluated: list[dict[str, Any]] = []

    class Log(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            logged.append(dict(logs))

        def on_evaluate(self, *_: Any, metrics: dict[str, Any], **__: Any) -> None:
            evaluated.append(dict(metrics))

    with joined(CONFIG, folder) as swarm:
        data = Numbered(64)
        held_out = {"one": Numbered(8), "two": Numbered(8)}
        more = {"eval_dataset": held_out, "eval_strategy": "epoch", "callbacks": [Log()], "save_steps": 4}
        trainer = a_trainer(swarm, folder, data=data, log_level="info", **more)
        trainer.train()
        trainer.save_model()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            trainer.log_metrics("train", {"train_loss": 1.0})
            trainer.accelerator.print("said once")
        return {
            "asked": data.asked,
            "weights": weights(trainer.model),
            "evaluated": evaluated,
            "logged": logged,
            "config": swarm.ds_config,
            "steps": trainer.state.max_steps,
            "output_dir": trainer.args.output_dir,
            "printed": printed.getvalue(),
            "level": transformers.utils.logging.get_verbosity(),
            "place": (trainer.args.process_index, trainer.args.world_size, trainer.args.should_save),
        }


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("trained")
    return pool.run(train_two_epochs, folder, timeout=120), folder


def test_every_sample_is_seen_once_in_an_epoch(trained: Any) -> None:
    ranks, _ = trained
    epochs = [[rank["asked"][:16] for rank in ranks], [rank["asked"][16:] for rank in ranks]]
    for epoch in epochs:
        assert sorted(index for asked in epoch for index in asked) == list(range(64))
    assert epochs[0] != epochs[1], "each epoch is shuffled anew"
    assert epochs[0][0] != sorted(epochs[0][0])


def test_the_trainer_sees_its_particle_also_without_an_accelerator(trained: Any) -> None:
    assert [rank["place"] for rank in trained[0]] == [(0, S, True), (1, S, False)] * P


def test_one_particle_tells_what_is_told_once(trained: Any) -> None:
    first, *others = trained[0]
    assert "***** train metrics *****" in first["printed"]
    assert "said once" in first["printed"]
    assert first["level"] == logging.INFO
    assert [(rank["printed"], rank["level"]) for rank in others] == [("", logging.WARNING)] * 3


def test_sync_points_come_when_they_are_due(trained: Any) -> None:
    ranks, folder = trained
    records = [record for record in read_metrics(folder / "out/metrics.jsonl") if record["event"] == "sync"]
    assert [record["step"] for record in records] == [4, 8]
    assert ranks[0]["steps"] == 64 * 2 // (4 * P * S)
    assert max(records[-1]["losses"]) < min(records[0]["losses"])


def test_auto_is_filled_in(trained: Any) -> None:
    config = trained[0][0]["config"]
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["optimizer"]["params"]["lr"] == 0.01
    assert config["scheduler"]["params"]["total_num_steps"] == 8
    assert "auto" not in json.dumps(config, default=str)


def test_all_hold_the_consensus_in_the_end_and_particle_0_saves_it_where_the_user_said(trained: Any) -> None:
    from transformers import AutoModelForCausalLM

    ranks, folder = trained
    for rank in ranks[1:]:
        same(rank["weights"], ranks[0]["weights"], rtol=0)
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    same(weights(model), ranks[0]["weights"], rtol=0)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert [Path(rank["output_dir"]).name for rank in ranks] == ["out", "out", "particle_1", "particle_1"]
    assert (folder / "out/particle_1/model.safetensors").exists()


def test_metrics_are_agreed_and_cover_every_dataset(trained: Any) -> None:
    ranks, _ = trained
    first = ranks[0]["evaluated"]
    for rank in ranks:
        losses = [{k: v for k, v in found.items() if k.endswith("_loss")} for found in rank["evaluated"]]
        assert [list(found) for found in losses] == [["eval_one_loss"], ["eval_two_loss"]] * 2
        assert losses == [{k: v for k, v in found.items() if k in losses[i]} for i, found in enumerate(first)]
    assert ranks[0]["evaluated"][2]["eval_one_loss"] < ranks[0]["evaluated"][0]["eval_one_loss"]


def test_sync_points_are_logged_beside_the_loss(trained: Any) -> None:
    logged = [entry for entry in trained[0][0]["logged"] if "Swarm/drift" in entry]
    assert len(logged) == 2
    assert all({"loss", "Swarm/seconds", "Swarm/loss/particle_1"} <= entry.keys() for entry in logged)


# -- against truth --------------------------------------------------------------------------


def train_with_sgd(folder: Path, mode: str, stream: bool) -> tuple[dict[str, np.ndarray], list[int]]:
    config = changed(CONFIG, sync_mode=mode, sync_interval=1)
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True}
    with joined({key: value for key, value in config.items() if key != "scheduler"}, folder) as swarm:
        data = Stream(64)
        trainer = a_trainer(
            swarm,
            folder,
            data=data if stream else None,
            max_steps=4,  # each of all 64 samples, in whatever order
            per_device_train_batch_size=64 // (P * S) // (1 if stream else 2),
            lr_scheduler_type="constant",
            max_grad_norm=1e6,  # clipping is not linear
            gradient_accumulation_steps=1 if stream else 2,
            learning_rate=0.1,
        )
        trainer.train()
        return weights(trainer.model), data.epochs


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_averaging_after_every_step_of_sgd_is_plain_data_parallel_training(
    pool: Pool, tmp_path: Path, stream: bool
) -> None:
    """Only if every sample was seen once in each step, both times, by whoever has split the data."""
    plain = pool.run(train_with_sgd, tmp_path / "plain", "allreduce", stream, timeout=120)
    swarm = pool.run(train_with_sgd, tmp_path / "swarm", "local_sgd", stream, timeout=120)
    same(swarm[0][0], plain[0][0], rtol=2e-4, atol=2e-6)
    assert swarm[0][1] == ([0, 1, 2, 3] if stream else []), "it gets the epoch, to shuffle anew"


def train_in_sequence(folder: Path) -> list[int]:
    with joined(CONFIG, folder) as swarm:
        data = Numbered(67)
        trainer = a_trainer(
            swarm, folder, data=data, train_sampling_strategy="sequential", per_device_train_batch_size=5
        )
        trainer.train()
        return data.asked


def test_data_in_sequence_that_does_not_divide(pool: Pool, tmp_path: Path) -> None:
    """And particles of a single rank."""
    ranks = pool.run(train_in_sequence, tmp_path, world_size=2, timeout=120)
    assert ranks == [list(range(rank, 66, 2)) * 2 for rank in range(2)]


# -- checkpoints ----------------------------------------------------------------------------

# So that the particles stay apart. Without a scheduler in the JSON the Trainer brings its own.
APART = changed({key: value for key, value in CONFIG.items() if key != "scheduler"}, sync_mode="pso", delay=2)
APART["swarm"]["sync_interval"] = 3


SHARDED = changed(
    APART | {"zero_optimization": {"stage": 3}}, sync_mode="easgd", wire="int8", fragments=2, sync_interval=3, delay=2
)


ALONE = changed(APART, particles=1, sync_mode="diloco", delay=0)


def train_until(folder: Path, config: dict[str, Any], stop: int | None, resume: Any) -> dict[str, Any]:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    with joined(config, folder) as swarm:
        data = Numbered(128)
        own = dict[str, np.ndarray]()

        class Own(TrainerCallback):  # before the consensus
            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                if swarm.session.synchronizer is None:
                    return  # a lone particle
                swarm.world.background.settle()
                shards = swarm.session.synchronizer.parts.shards.tensors
                own.update({str(i): shard.numpy().copy() for i, shard in enumerate(shards)})

        trainer = a_trainer(
            swarm,
            folder,
            dropout=0.2,
            data=data,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=1 if config is SHARDED else 0,
            save_strategy="steps",
            save_steps=4,
            callbacks=[Stop()],
        )
        trainer.add_callback(Own())
        trainer.train(resume_from_checkpoint=resume)
        with torch.no_grad():
            logits = trainer.deepspeed(torch.arange(8)[None]).logits.numpy()
        if swarm.session.synchronizer is not None:
            states = swarm.session.synchronizer.parts.updater.state
            own |= {f"{i}.{k}": v.float().numpy().copy() for i, state in enumerate(states) for k, v in state.items()}
        return {"own": own, "logits": logits, "asked": data.asked, "last": swarm.last_sync and swarm.last_sync.sync}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(APART, id="pso"),
        pytest.param(SHARDED, id="easgd-zero3", marks=pytest.mark.slow),
        pytest.param(ALONE, id="one-particle", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_ends_where_the_whole_one_does(pool: Pool, tmp_path: Path, config: dict[str, Any]) -> None:
    """Step 4 lies between the beginning of a delayed sync point and its end."""
    options = {"world_size": S * config["swarm"]["particles"], "timeout": 120}
    whole = pool.run(train_until, tmp_path / "whole", config, None, False, **options)
    pool.run(train_until, tmp_path / "parts", config, 4, False, **options)
    resume = str(tmp_path / "parts/out/checkpoint-4") if config is SHARDED else "True"  # as from a command line
    parts = pool.run(train_until, tmp_path / "parts", config, None, resume, **options)
    for one, other in zip(parts, whole, strict=True):
        for key, value in other["own"].items():
            assert np.array_equal(one["own"][key], value), key
        assert np.array_equal(one["logits"], other["logits"])
        assert one["last"] == other["last"]
        assert one["asked"][-16:] == other["asked"][-16:]
    if config is ALONE:
        assert len(list(tmp_path.glob("parts/out/checkpoint-4/**/swarm"))) == 1, "the swarm's part is written once"
        assert whole[0]["last"] == 9
        return
    assert not np.array_equal(whole[0]["own"]["0"], whole[2]["own"]["0"]), "the particles were not apart"
    for rank in whole[1:]:
        assert np.array_equal(rank["logits"], whole[0]["logits"]), "they are the consensus in the end"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("True", True),
        ("true", True),
        ("False", None),
        ("None", None),
        ("", None),
        ("out/checkpoint-4", ...),
        (True, True),
    ],
)
def test_what_a_command_line_says(given: Any, meant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_pso.hf_trainer.callback import _as_meant

    assert (_as_meant(given) or None) == (given if meant is ... else meant)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "true").mkdir()
    assert _as_meant("true") == "true", "a folder of that name is a folder"


PICKLES = {  # the kind of file; and whether it is read, and so refused, or left alone under DeepSpeed
    "global_step*/*model_states.pt": True,
    "global_step*/*optim_states.pt": True,
    "rng_state*.pth": True,  # when the engine is attached, so that the Trainers after this one are refused
    "scheduler.pt": False,
    "scaler.pt": False,
    "optimizer.pt": False,
    "pytorch_model.bin": False,
    "training_args.bin": False,
}


def resume_what_runs_code(folder: Path, particles: int, evil: Path) -> list[tuple[str, str, bool]]:
    """Of each kind of file: its pattern, how resuming went, and whether it has run."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    config = changed(APART, particles=particles)
    found = []
    with joined(config, folder) as swarm:
        own = folder / "out" / (f"particle_{swarm.particle}" if particles > 1 else "") / "checkpoint-4"
        for pattern in PICKLES:
            swarm.world.coordinator.gather("the next kind", 0)
            if swarm.world.layout.shard_rank == 0:
                shutil.rmtree(own)
                shutil.copytree(own.with_name("whole"), own)
                for path in list(own.glob(pattern)) or [own / pattern]:
                    torch.save({"module": Evil(str(evil))}, path)
                    seal(own, path)
            swarm.world.coordinator.gather("spoiled", 0)
            options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8}
            trainer = a_trainer(swarm, folder, data=Numbered(128), callbacks=[Stop()], **options)
            try:
                trainer.train(resume_from_checkpoint=True)
                how = "trained"
            except Exception as error:
                how = f"{type(error).__name__}: {error}"
            found.append((pattern, how, evil.exists()))
            evil.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("particles", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_resuming_runs_no_code_of_a_checkpoint(pool: Pool, tmp_path: Path, particles: int) -> None:
    pool.run(train_until, tmp_path, changed(APART, particles=particles), 4, False, world_size=2, timeout=120)
    for path in tmp_path.rglob("checkpoint-4"):
        shutil.copytree(path, path.with_name("whole"))
    evil = tmp_path / "evil"
    found = f"it holds {open.__module__}.open, which is no plain data"  # the module depends on the version of Python
    refused = f"CheckpointError: a file of the checkpoint could not be loaded: {found}"
    for rank in pool.run(resume_what_runs_code, tmp_path, particles, evil, world_size=2, timeout=240):
        for pattern, how, has_run in rank:
            assert not has_run, pattern
            assert how.startswith(refused) == PICKLES[pattern], (pattern, how)


def train_and_take_the_best(
    folder: Path, config: dict[str, Any], every: str, evaluate_consensus: bool
) -> dict[str, Any]:
    from transformers import EarlyStoppingCallback

    agreed, evaluated = [], []

    class Patience(EarlyStoppingCallback):
        def on_evaluate(self, *args: Any, metrics: dict[str, float], **others: Any) -> None:
            agreed.append(metrics["eval_loss"])
            super().on_evaluate(*args, metrics=metrics, **others)

    with joined(config, folder) as swarm:
        trainer = a_trainer(
            swarm,
            folder,
            evaluate_consensus=evaluate_consensus,
            num_train_epochs=4,
            eval_dataset=Numbered(8),
            eval_strategy=every,
            eval_steps=2,
            save_strategy=every,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the first one is the best, and patience ends
            callbacks=[Patience(2)],
        )
        prediction_step = trainer.prediction_step

        def look(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not evaluated:
                evaluated.append(weights(getattr(model, "module", model)))
            return prediction_step(model, *args, **kwargs)

        trainer.prediction_step = look
        trainer.train()
        return {
            "best": trainer.state.best_global_step,
            "stopped": trainer.state.global_step,
            "evaluated": evaluated[0],
            "weights": weights(trainer.model),
            "agreed": agreed,
        }


@pytest.mark.parametrize(
    ("config", "every", "evaluate_consensus"),
    [
        pytest.param(APART, "steps", True, id="consensus", marks=pytest.mark.slow),
        pytest.param(APART, "steps", False, id="own", marks=pytest.mark.slow),
        # When it is stopped a sync point is pending, and the rule keeps the model in its state.
        pytest.param(changed(APART, sync_mode="easgd", sync_interval=2), "epoch", True, id="easgd"),
    ],
)
def test_the_best_model_is_the_consensus_of_the_best_step(
    pool: Pool, tmp_path: Path, config: dict[str, Any], every: str, evaluate_consensus: bool
) -> None:
    ranks = pool.run(train_and_take_the_best, tmp_path, config, every, evaluate_consensus, timeout=120)
    first = 2 if every == "steps" else 4
    assert [(rank["best"], rank["stopped"]) for rank in ranks] == [(first, 3 * first)] * 4
    saved = [load_file(tmp_path / f"out/particle_{i}/checkpoint-{first}/model.safetensors") for i in range(P)]
    assert not torch.equal(saved[0]["model.embed_tokens.weight"], saved[1]["model.embed_tokens.weight"])
    if evaluate_consensus:
        expected = ranks[0]["evaluated"]
        losses = [loss_of(expected)]
    else:
        expected = {name: (saved[0][name] + saved[1][name]) / 2 for name in saved[0]}
        losses = [loss_of(ranks[0]["evaluated"]), loss_of(ranks[S]["evaluated"])]
    for rank in ranks:
        same({name: rank["weights"][name] for name in expected}, expected, rtol=1e-5, atol=1e-7)
        assert rank["agreed"] == ranks[0]["agreed"]
        assert rank["agreed"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    assert ranks[0]["agreed"][0] != ranks[0]["agreed"][1]


def loss_of(found: dict[str, np.ndarray]) -> float:
    model = llama()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()}, strict=False)
    rows = torch.stack([Numbered(8)[index]["input_ids"] for index in range(8)])
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def resume_what_is_spoiled(folder: Path, named: Any) -> str:
    from ds_pso.errors import CheckpointError

    with joined(APART, folder) as swarm:
        trainer = a_trainer(swarm, folder, dropout=0.2, data=Numbered(128), save_strategy="steps", save_steps=4)
        with pytest.raises(CheckpointError) as error:
            trainer.train(resume_from_checkpoint=named)
    return str(error.value)


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_refused(pool: Pool, tmp_path: Path) -> None:
    def message(named: Any = True) -> str:
        messages = pool.run(resume_what_is_spoiled, tmp_path, named, timeout=120)
        assert len(set(messages)) <= P, "one of each particle, or of all"
        return messages[-1]

    assert "no checkpoint to resume" in message()
    pool.run(train_until, tmp_path, APART, 4, False, timeout=120)
    assert "not in " in message(str(tmp_path / "elsewhere/checkpoint-4"))
    checkpoint = tmp_path / "out/particle_1/checkpoint-4"
    (checkpoint / "swarm").rename(tmp_path / "away")
    assert "checkpoint-4: holds nothing of the swarm" in message()
    (tmp_path / "away").rename(checkpoint / "swarm")
    state = checkpoint / "trainer_state.json"
    text = state.read_text()
    state.write_text(text.replace("4", "5"))
    assert "trainer_state.json: damaged" in message()
    state.write_text(text)
    checkpoint.rename(checkpoint.with_name("checkpoint-2"))
    assert "from different steps, checkpoint-2 and checkpoint-4" in message()


def resume_a_stream(folder: Path, stop: int | None, resume: bool) -> tuple[list[int], list[str]]:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    with joined(CONFIG, folder) as swarm, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        data = Stream(32)  # 4 steps of 2 ranks with 4 samples each
        options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "callbacks": [Stop()]}
        trainer = a_trainer(swarm, folder, data=data, **options)
        trainer.train(resume_from_checkpoint=resume)
        return data._samples.asked, [str(warning.message) for warning in warned if "a stream" in str(warning.message)]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 6], ids=["first pass", "second pass"])
def test_resuming_a_stream(pool: Pool, tmp_path: Path, stop: int) -> None:
    """Exact in the first pass; later it cannot be, and says so."""
    whole = pool.run(resume_a_stream, tmp_path / "whole", None, False, world_size=2, timeout=120)
    pool.run(resume_a_stream, tmp_path / "parts", stop, False, world_size=2, timeout=120)
    parts = pool.run(resume_a_stream, tmp_path / "parts", None, True, world_size=2, timeout=120)
    print(whole, parts)
    assert [len(rank[1]) for rank in whole] == [0, 0]
    assert [len(rank[1]) for rank in parts] == ([0, 0] if stop == 2 else [1, 0])


def train_a_wrapped_model(folder: Path) -> str:
    from transformers import Trainer, TrainingArguments

    from ds_pso.errors import UnsupportedError
    from ds_pso.hf_trainer import SwarmCallback

    with joined(CONFIG, folder) as swarm:
        args = TrainingArguments(output_dir=str(folder), deepspeed=swarm.ds_config, report_to="none")
        trainer = Trainer(torch.compile(llama(), backend="eager"), args, train_dataset=Numbered(64))
        with pytest.raises(UnsupportedError) as error:
            SwarmCallback(swarm, trainer)
    return str(error.value)


def test_a_compiled_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(train_a_wrapped_model, tmp_path, world_size=2, timeout=120):
        assert "or a layer of it, is wrapped" in said
        assert "torch_compile=True" in said


# -- export from what the Trainer has saved -------------------------------------------------


def assert_exported(folder: Path, argv: list[str], expected: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from ds_pso.cli import main as cli

    assert cli.main(["export", *argv, "--output", str(folder)]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    same(weights(model), expected, rtol=1e-6, atol=1e-7)


def test_export_of_what_the_trainer_has_saved(pool: Pool, tmp_path: Path, capsys: Any) -> None:
    """From any of the folders; without launcher."""
    from ds_pso.cli import main as cli

    pool.run(train_until, tmp_path, APART, 4, False, timeout=120)
    out = tmp_path / "out"
    own = [load_file(out / f"particle_{i}/checkpoint-4/model.safetensors") for i in range(P)]
    mean = {name: ((own[0][name] + own[1][name]) / 2).numpy() for name in own[0]}
    for number, place in enumerate((out, out / "particle_1", out / "particle_1/checkpoint-4")):
        assert_exported(tmp_path / str(number), [str(place)], mean)
    single = {name: value.numpy() for name, value in own[1].items()}
    assert_exported(tmp_path / "single", [str(out), "--tag", "checkpoint-4", "--particle", "1"], single)
    capsys.readouterr()
    shutil.rmtree(out / "particle_1/checkpoint-4/swarm")
    assert cli.main(["export", str(out)]) == 1
    assert "no checkpoint of a swarm to export; give the output_dir of a Trainer" in capsys.readouterr().err


# -- what is refused ------------------------------------------------------------------------


def refusals(folder: Path) -> dict[str, str]:
    from transformers import Trainer, TrainingArguments

    from ds_pso.hf_trainer import SwarmCallback

    found = {}

    def note(name: str, make: Any) -> None:
        try:
            make()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    with joined(CONFIG, folder) as swarm:
        for name, value in (
            ("train_sampling_strategy", "group_by_length"),
            ("auto_find_batch_size", True),
            ("save_on_each_node", True),
            ("save_total_limit", 1),
            ("enable_jit_checkpoint", True),
        ):
            note(name, lambda name=name, value=value: a_trainer(swarm, folder, **{name: value}))
        note("few", lambda: a_trainer(swarm, folder, data=Numbered(3)).train())

        class Weighted(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.WeightedRandomSampler(torch.ones(64), 64)

        args = TrainingArguments(output_dir=str(folder), deepspeed=swarm.ds_config, report_to="none")
        trainer = Weighted(llama(), args, train_dataset=Numbered(64))
        trainer.add_callback(SwarmCallback(swarm, trainer))
        note("sampler", trainer.train)

        monitored = {**swarm.ds_config, "csv_monitor": {"enabled": True, "output_path": str(folder)}}
        note("monitor", lambda: a_trainer(swarm, folder, deepspeed=monitored).train())
    return found


def test_what_the_swarm_cannot_follow_is_refused(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(refusals, tmp_path, timeout=120):
        assert found["train_sampling_strategy"].startswith(
            "UnsupportedError: TrainingArguments.train_sampling_strategy = 'group_by_length'"
        )
        assert found["auto_find_batch_size"].startswith(
            "UnsupportedError: TrainingArguments.auto_find_batch_size = True"
        )
        assert found["save_on_each_node"].startswith("UnsupportedError: TrainingArguments.save_on_each_node = True")
        assert found["save_total_limit"].startswith("UnsupportedError: TrainingArguments.save_total_limit = 1")
        assert found["enable_jit_checkpoint"].startswith("UnsupportedError: TrainingArguments.enable_jit_checkpoint")
        assert found["few"] == "ConfigError: the train dataset has 3 samples for 4 ranks; use more"
        assert found["sampler"].startswith("UnsupportedError: the Trainer's train loader has a WeightedRandomSampler")
        assert found["monitor"].startswith(
            "ConfigError: csv_monitor: the particles would write into one another's files"
        )


def test_an_elastic_swarm_is_refused() -> None:
    from types import SimpleNamespace

    import ds_pso
    from ds_pso.hf_trainer.callback import _check_supported

    swarm: Any = SimpleNamespace(
        num_particles=2,
        config=SimpleNamespace(per_particle=None, remote_checkpoints=None),
        world=SimpleNamespace(membership=SimpleNamespace(reachable=lambda: (0,))),
    )
    trainer: Any = SimpleNamespace(args=None, is_deepspeed_enabled=True)
    with pytest.raises(ds_pso.ConfigError, match="counts its own steps"):
        _check_supported(swarm, trainer)


def without_deepspeed(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    import ds_pso
    from ds_pso.hf_trainer import SwarmCallback

    with ds_pso.init({"swarm": {"particles": 1}}) as swarm:
        args = TrainingArguments(output_dir=str(folder), report_to="none")
        with pytest.raises(ds_pso.ConfigError, match="does not use DeepSpeed"):
            SwarmCallback(swarm, Trainer(llama(), args))


def test_a_trainer_without_deepspeed_is_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(without_deepspeed, tmp_path, world_size=1)


def train_experts(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with joined(changed(CONFIG, sync_interval="never"), folder) as swarm:
        trainer = a_trainer(swarm, folder, max_steps=6)
        trainer.train()
        expert = weights(trainer.model)
        swarm.merge()
        return expert, weights(trainer.model)


def test_particles_that_never_sync_are_left_apart_for_the_script(pool: Pool, tmp_path: Path) -> None:
    (first, merged), (second, _) = pool.run(train_experts, tmp_path, world_size=2, timeout=120)
    assert any((first[name] != second[name]).any() for name in first)
    same({name: (first[name] + second[name]) / 2 for name in first}, merged, rtol=1e-5, atol=1e-7)


# -- LoRA, and the page ---------------------------------------------------------------------


def train_adapter(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    import peft
    from transformers import Trainer, TrainingArguments

    from ds_pso.hf_trainer import SwarmCallback

    with joined(CONFIG, folder) as swarm:
        torch.manual_seed(swarm.world.layout.rank)
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        args = TrainingArguments(
            output_dir=str(folder / "out"),
            deepspeed=swarm.ds_config,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            learning_rate=0.01,
            report_to="none",
            save_steps=4,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=Numbered(64))
        trainer.add_callback(SwarmCallback(swarm, trainer))
        trainer.train()
        trainer.save_model()
        return weights(trainer.model), swarm.last_sync


def test_adapters_train_and_are_saved(pool: Pool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ranks = pool.run(train_adapter, tmp_path, timeout=120)
    for own, _ in ranks[1:]:
        same(own, ranks[0][0], rtol=0)
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert saved
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    trained = sum(value.numel() for value in saved.values())
    assert ranks[0][1].bytes_received < 1.5 * 4 * trained, "only the adapter travels"


def run_page(folder: Path, script: Path) -> None:
    import os

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.chdir(folder)
    runpy.run_path(str(script), run_name="__main__")


def test_the_script_of_the_page_runs(pool: Pool, tmp_path: Path) -> None:
    source = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source), encoding="utf-8")
    pool.run(run_page, tmp_path, script, timeout=120)
    losses = [r["losses"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if r["event"] == "held_out"]
    assert len(losses) == 4
    assert max(losses[-1]) < 0.5 * min(losses[0])
    assert (tmp_path / "out/model.safetensors").exists()
    assert len(list((tmp_path / "out/particle_1").glob("checkpoint-*"))) == 2
