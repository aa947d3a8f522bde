"""Every recipe's smoke run on real ranks under Accelerate: it learns, and what it exports is what it measured."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ds_pso.metrics.log import read_metrics

ROOT = Path(__file__).parents[2]


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def under_accelerate(config: Path, mixed_precision: str = "no") -> dict[str, str]:
    """Return the environment that ``accelerate launch`` gives a script."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
        "ACCELERATE_MIXED_PRECISION": mixed_precision,
        "HF_HUB_OFFLINE": "1",
    }


def run_recipe(name: str, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = load_recipe(name).main(argv)
    return code, out.getvalue(), err.getvalue()


def smoke(pool: Pool, folder: Path, name: str, *argv: str, precision: str = "no", world_size: int = 2) -> float:
    """The final metric of a run of two particles that went as it should."""
    environment = under_accelerate(ROOT / "recipes/local_sgd.json", precision)
    arguments = ["--smoke", "--output_dir", str(folder), *argv]
    results = pool.run(run_recipe, name, arguments, env=environment, world_size=world_size, timeout=120)
    assert [code for code, _, _ in results] == [0] * world_size, results
    assert all(out == "" for _, out, _ in results[1:]), "only the leader prints"
    printed = re.findall(r"^final (\w+) ([\d.]+) \(the consensus of 2 particles\)", results[0][1], flags=re.MULTILINE)
    assert len(printed) == 1
    records = read_metrics(folder / "metrics.jsonl")
    assert records[-1]["event"] == "final"
    metric = records[-1][printed[0][0]]
    assert f"{metric:.4f}" == printed[0][1]
    syncs = [record for record in records if record["event"] == "sync"]
    assert len(syncs) >= 5
    assert syncs[-1]["drift"] > 0
    return metric


def accuracy_of(logits: Callable[[Tensor], Tensor], run: Path) -> float:
    """Return the accuracy of an exported model on the test images, read without any code of the recipes."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(run / "made" / "test.parquet"), cache_dir=str(run / "cache"))
    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in rows["image"]])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 128) / 64
    with torch.no_grad():
        return float((logits(images).argmax(1) == torch.tensor(rows["label"][:])).float().mean())


def held_out_loss(model: Any, run: Path, length: int = 32) -> float:
    tokens = torch.from_numpy(np.load(run / "data" / "held_out.npy").astype(np.int64))
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        logits = model(blocks).logits.float()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()))


# The chance is 0.1 with ten classes, and 0.5 with two.


def test_mnist_cnn(pool, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("of an earlier run")
    metric = smoke(pool, tmp_path / "run", "mnist_cnn", world_size=4)
    assert (tmp_path / "run.1/config.json").read_text() == "of an earlier run"
    assert metric > 0.7
    model = load_recipe("mnist_cnn").ConvNet()
    model.load_state_dict(load_file(tmp_path / "run/model/model.safetensors"))
    assert accuracy_of(model, tmp_path / "run") == pytest.approx(metric, abs=0.002)


def test_cifar10_resnet(pool, tmp_path):
    from transformers import AutoModelForImageClassification

    # One rank a particle: several would have statistics of batch normalisation each, as under DeepSpeed alone.
    metric = smoke(pool, tmp_path / "run", "cifar10_resnet")
    assert metric > 0.7
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run/model")
    accuracy = accuracy_of(lambda images: model(F.interpolate(images, scale_factor=2)).logits, tmp_path / "run")
    assert accuracy == pytest.approx(metric, abs=0.002)


@pytest.mark.slow
def test_vit_cifar10(pool, tmp_path):
    from transformers import AutoModelForImageClassification

    metric = smoke(pool, tmp_path / "run", "vit_cifar10")
    assert metric > 0.6
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run/model")
    assert accuracy_of(lambda images: model(images).logits, tmp_path / "run") == pytest.approx(metric, abs=0.002)


@pytest.mark.slow
def test_seq_classification(pool, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    metric = smoke(pool, tmp_path / "run", "seq_classification")
    assert metric > 0.8
    rows = Dataset.from_parquet(str(tmp_path / "run/made/test.parquet"), cache_dir=str(tmp_path / "run/cache"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        logits = model(**tokenizer(rows["text"][:], padding=True, return_tensors="pt")).logits
    found = (logits.argmax(1) == torch.tensor(rows["label"][:])).float().mean()
    assert float(found) == pytest.approx(metric, abs=0.002)


# Who knows how often each of 40 words comes, and not what follows on what, has a loss of 3.7.


def test_causal_lm_pretrain_in_bf16(pool, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metric = smoke(pool, tmp_path / "run", "causal_lm_pretrain", precision="bf16")
    assert metric < 2.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.dtype == torch.bfloat16
    assert held_out_loss(model, tmp_path / "run") == pytest.approx(metric, abs=0.1)  # of all blocks, not a part
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    prompt = tokenizer("bara", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).shape == (1, prompt.shape[1] + 5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_causal_lm_finetune(pool, tmp_path, lora):
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    metric = smoke(pool, run, "causal_lm_finetune", *(["--lora"] if lora else []), world_size=4 if lora else 2)
    base = held_out_loss(AutoModelForCausalLM.from_pretrained(run / "base"), run)
    assert base > 4  # it knows another language
    assert metric < 2.5
    weights = {path.name for path in (run / "model").glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors" if lora else "model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(run / "model")  # with adapters, it finds the base that they name
    assert held_out_loss(model, run) == pytest.approx(metric, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_experts_finetune(pool, tmp_path, lora):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    arguments = ["--smoke", "--output_dir", str(folder), *(["--lora"] if lora else [])]
    environment = under_accelerate(ROOT / "recipes/experts.json")
    results = pool.run(run_recipe, "experts_finetune", arguments, env=environment, world_size=4, timeout=200)
    assert [code for code, _, _ in results] == [0] * 4, results
    printed = dict(
        re.findall(r"^(best expert|mean of all|final test_loss) ([\d.]+)", results[0][1], flags=re.MULTILINE)
    )
    best, mean, found = (float(printed[name]) for name in ("best expert", "mean of all", "final test_loss"))
    assert found < best, "each expert knows one of the target's two languages"
    assert found <= mean + 0.02
    records = read_metrics(folder / "metrics.jsonl")
    assert not [record for record in records if record["event"] == "sync"]
    assert len([record for record in records if record["event"] == "search"]) > 20
    weights = {path.name for path in (folder / "model").glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors" if lora else "model.safetensors"}
    AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.parametrize(
    ("name", "argv", "named"),
    [
        ("mnist_cnn", ["--steps", "none"], "--steps"),
        ("mnist_cnn", ["--dataset", "/nowhere/images"], "--dataset /nowhere/images"),
        ("causal_lm_finetune", ["--model", "/nowhere/model"], "--model /nowhere/model"),
    ],
)
def test_bad_input_is_one_line_from_the_leader(pool, tmp_path, name, argv, named):
    environment = under_accelerate(ROOT / "recipes/local_sgd.json")
    arguments = ["--output_dir", str(tmp_path / "run"), *argv]
    results = pool.run(run_recipe, name, arguments, world_size=2, env=environment, timeout=60)
    assert [code for code, _, _ in results] == [1, 1]
    errors = [line for line in results[0][2].splitlines() if line.startswith("ds_pso: error:")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "ds_pso: error" not in results[1][2]
