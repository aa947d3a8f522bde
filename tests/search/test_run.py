"""Whole searches over small Llamas and adapters: what is composed, what is written, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_pso.cli import main as cli
from ds_pso.errors import ConfigError, UnsupportedError
from ds_pso.search.experts import Expert
from ds_pso.search.model import ComposedModel
from ds_pso.search.record import NAME
from ds_pso.search.run import SearchSettings, search_experts
from ds_pso.search.space import Space, find_blocks

from . import scores

MODULE = scores.__name__
SCORE = f"{MODULE}:loss"
TEST = f"{MODULE}:test_loss"
NAMES = ("code", "law", "math")
LLAMA = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
}


def build(seed: int, folder: Path, **changes: object) -> Path:
    """Write a small Llama with random weights."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"tie_word_embeddings": True, **LLAMA, **changes}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of several processes on few cores would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, their base, and three adapters of it."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("base", *NAMES)):
        build(seed, folder / name)
    (folder / "code" / "tokenizer.json").write_text("{}")
    for seed in range(3):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder / "base"), config)
        model.save_pretrained(folder / f"adapter{seed}")
    return folder


def search(zoo: Path, out: Path, **changes: object) -> SearchSettings:
    given = {"experts": [zoo / name for name in NAMES], "out": out, "score": SCORE, "evaluations": 20}
    return SearchSettings(**given | changes)


def composed(zoo: Path, *, base: bool = False, blocks: str = "layers") -> tuple[ComposedModel, Space, list[Expert]]:
    experts = [Expert.open(zoo / name) for name in NAMES]
    model = ComposedModel(experts, Expert.open(zoo / "base") if base else None, torch.device("cpu"))
    return model, Space(NAMES, find_blocks(model.shapes, blocks), base), experts


def written(folder: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(folder / name)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what is composed -------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_one_hot_coefficients_are_exactly_that_expert(zoo, tmp_path, base):
    model, space, _ = composed(zoo, base=base)
    for k, name in [*enumerate(NAMES), *reversed(list(enumerate(NAMES)))]:
        model.compose(space, space.one_hot(k))
        model.save(tmp_path / name)
        assert equal(written(tmp_path / name), written(zoo / name))
    if base:
        model.compose(space, space.origin())
        model.save(tmp_path / "again")
        assert equal(written(tmp_path / "again"), written(zoo / "base"))


def test_uniform_coefficients_are_the_soup(zoo, tmp_path):
    model, space, _ = composed(zoo)
    model.compose(space, space.uniform())
    model.save(tmp_path)
    parts = [written(zoo / name) for name in NAMES]
    for name, tensor in written(tmp_path).items():
        torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).double().mean(0).float())


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("blocks", ["layers", "tensors", "one"])
def test_any_coefficients_are_the_sum_of_movements(zoo, tmp_path, base, blocks):
    model, space, _ = composed(zoo, base=base, blocks=blocks)
    c = torch.randn(space.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if not base:
        c += (1 - c.sum(0)) / len(NAMES)
    model.compose(space, c.numpy())
    model.save(tmp_path)
    parts, origin = [written(zoo / name) for name in NAMES], written(zoo / "base")  # any origin, where the sum is 1
    number = {name: b for b, names in enumerate(space.blocks.values()) for name in names}
    for name, tensor in written(tmp_path).items():
        x = origin[name].double()
        expected = x + sum(c[k, number[name]] * (part[name].double() - x) for k, part in enumerate(parts))
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-5)


def test_an_expert_that_is_nan_harms_only_where_it_has_a_part(zoo, tmp_path):
    for name in ("base", *NAMES):
        shutil.copytree(zoo / name, tmp_path / name)
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in written(zoo / "math").items()}
    save_file(spoilt, tmp_path / "math" / "model.safetensors", {"format": "pt"})
    result = search_experts(search(tmp_path, tmp_path / "out"))
    assert result.winner.score <= result.best_single.score < float("inf")
    assert all(tensor.isfinite().all() for tensor in written(tmp_path / "out").values())
    record = json.loads((tmp_path / "out" / NAME).read_text())
    assert [item["score"] for item in record["evaluations"] if item["by"] == "expert math"] == [None]


def test_files_of_experts_are_not_changed(zoo, tmp_path):
    before = {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}
    search_experts(search(zoo, tmp_path, base=zoo / "base"))
    assert before == {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}


def test_several_files_and_half_precision_and_a_head_of_its_own(zoo, tmp_path):
    for seed, name in enumerate(NAMES):
        build(seed, tmp_path / "whole", tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
    assert len(list((tmp_path / "code").glob("model-*.safetensors"))) > 1
    result = search_experts(search(tmp_path, tmp_path / "out", blocks="layers"))
    found = json.loads(result.record.read_text())["result"]["winner"]["coefficients"]
    assert list(found["code"]) == ["embedding", "model.layers.0", "model.layers.1", "head"]
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert opened.dtype == torch.bfloat16
    assert scores.loss(opened.eval()) == result.winner.score


# -- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_the_model_on_disk_has_the_scores_of_the_summary(zoo, tmp_path, base):
    scores.calls.clear()
    result = search_experts(search(zoo, tmp_path / "out", test=TEST, base=zoo / "base" if base else None))
    assert scores.calls == ["loss"] * 20 + ["test"] * 3
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert scores.loss(opened) == result.winner.score
        assert float(scores.test_loss(opened)) == result.winner.test
    assert result.winner.score <= min(result.best_single.score, result.uniform_soup.score)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    record = json.loads((tmp_path / "out" / NAME).read_text())
    scored = [item["score"] for item in record["evaluations"]]
    assert result.winner.score == min(scored) == record["result"]["improvements"][-1]["score"]
    for improvement in record["result"]["improvements"]:
        assert improvement["score"] == scored[improvement["evaluation"] - 1]


def test_the_higher_score_wins_if_it_is_better(zoo, tmp_path):
    low = search_experts(search(zoo, tmp_path / "low"))
    high = search_experts(search(zoo, tmp_path / "high", score=f"{MODULE}:likelihood", higher_is_better=True))
    assert high.winner.score == -low.winner.score
    assert equal(written(tmp_path / "low"), written(tmp_path / "high"))


def test_adapters_become_one_adapter(zoo, tmp_path):
    adapters = [zoo / f"adapter{k}" for k in range(3)]
    result = search_experts(search(zoo, tmp_path, experts=adapters))
    base = transformers.LlamaForCausalLM.from_pretrained(zoo / "base")
    opened = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert scores.loss(opened) == result.winner.score
    coefficients = json.loads(result.record.read_text())["result"]["winner"]["coefficients"]
    parts = [written(adapter, "adapter_model.safetensors") for adapter in adapters]
    for name, tensor in written(tmp_path, "adapter_model.safetensors").items():
        layer = name.split(".self_attn")[0]
        expected = sum(coefficients[f"adapter{k}"][layer] * part[name] for k, part in enumerate(parts))
        rest = (1 - sum(coefficients[f"adapter{k}"][layer] for k in range(3))) / 3
        torch.testing.assert_close(tensor, expected + rest * sum(part[name] for part in parts), atol=1e-6, rtol=1e-5)


def test_where_nothing_is_better_the_best_expert_is_written(zoo, tmp_path, capsys, monkeypatch):
    law = written(zoo / "law")

    def distance(model: torch.nn.Module) -> float:
        return float(sum((parameter - law[name]).square().sum() for name, parameter in model.named_parameters()))

    monkeypatch.setattr(scores, "loss", distance)
    command = ["search", *(str(zoo / name) for name in NAMES), "--score", SCORE, "--out", str(tmp_path)]
    assert cli.main([*command, "--evaluations", "20"]) == 0
    out = capsys.readouterr().out
    assert "best single: expert law" in out
    assert "no improvement: no combination scores better than the best single expert" in out
    assert equal(written(tmp_path), law)


# -- going on ---------------------------------------------------------------------------------


def test_a_search_that_was_stopped_goes_on(zoo, tmp_path, capsys, monkeypatch):
    def stop_at(count: int) -> None:
        def loss(model: torch.nn.Module) -> float:
            seen.append(1)
            if len(seen) == count:
                raise KeyboardInterrupt
            return real(model)

        seen: list[int] = []
        monkeypatch.setattr(scores, "loss", loss)

    real = scores.loss
    experts = [str(zoo / name) for name in NAMES]
    command = ["search", *experts, "--score", SCORE, "--evaluations", "20", "--out"]
    stop_at(13)
    assert cli.main([*command, str(tmp_path / "stopped")]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    stop_at(9)  # of the eight that are left
    assert cli.main([*command, str(tmp_path / "stopped"), "--resume"]) == 0
    stop_at(21)
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    for name in (NAME, "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_search_gives_the_same_files(zoo, tmp_path):
    """SIGKILL in the middle; the experts may have moved meanwhile."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
        "OMP_NUM_THREADS": "1",
    }
    experts = [str(zoo / name) for name in NAMES]
    options = ["--score", SCORE, "--evaluations", "300", "--searcher", "pso", "--seed", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "ds_pso.cli.main", "search", *experts, *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    record = tmp_path / "killed" / NAME
    until = time.monotonic() + 120
    while time.monotonic() < until and not (record.exists() and record.read_text().count('"by"') > 30):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    count = len(json.loads(record.read_text())["evaluations"])
    assert 30 < count < 300
    evaluations = count + 20
    shutil.copytree(zoo, tmp_path / "moved")
    for folder, place, more in (("killed", tmp_path / "moved", ["--resume"]), ("whole", zoo, [])):
        options[3] = str(evaluations)
        moved = [str(place / name) for name in NAMES]
        assert cli.main(["search", *moved, *options, "--out", str(tmp_path / folder), *more]) == 0
    for name in (NAME, "model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_expert_of_the_same_name_is_not_mixed_in(zoo, tmp_path):
    search_experts(search(zoo, tmp_path / "out"))
    for name in NAMES:
        shutil.copytree(zoo / name, tmp_path / name)
    build(9, tmp_path / "law")
    with pytest.raises(ConfigError, match=r"search.json: was searched with experts = "):
        search_experts(search(tmp_path, tmp_path / "out", resume=True))


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score": MODULE},
            r"--score .*scores: must name a function as my_module:my_function",
        ),
        ({"score": "no_such_module:loss"}, r"--score no_such_module:loss: cannot be imported \(ModuleNotFoundError"),
        (
            {"score": f"{MODULE}:lost"},
            r"scores has no function of this name; check the spelling",
        ),
        ({"test": f"{MODULE}:lost"}, r"--test .*scores:lost: .*scores has no"),
        ({"score": f"{MODULE}:text"}, r"--score: returned a str; let it return a number"),
        ({"score": f"{MODULE}:with_dropout"}, r"--score: expert code has the score"),
        ({"evaluations": 4}, r"--evaluations 4: must be at least 5"),
        ({"searcher": "task_arithmetic"}, r"give it with --base"),
        ({"device": "gpu"}, r"--device gpu: cannot be used"),
    ],
)
def test_bad_settings(zoo, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        search_experts(search(zoo, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, r"other: model.embed_tokens.weight has the shape \[65, 16\], and \[64, 16\] in "),
        ({"num_hidden_layers": 3}, r"has other tensors than .*; added model.layers.2.* and \d+ more; give experts"),
        ({"num_hidden_layers": 1}, r"has other tensors than .*; missing model.layers.1"),
        ({"tie_word_embeddings": False}, r"has other tensors than .*; added lm_head.weight"),
    ],
)
def test_experts_of_another_architecture(zoo, tmp_path, changes, message):
    build(0, tmp_path / "other", **changes)
    for given in ({"experts": [zoo / "code", tmp_path / "other"]}, {"base": tmp_path / "other"}):
        with pytest.raises(ConfigError, match=message):
            search_experts(search(zoo, tmp_path / "out", **given))


def test_a_config_that_differs_is_mentioned(zoo, tmp_path, caplog):
    build(0, tmp_path / "other", rms_norm_eps=1e-3)
    with caplog.at_level(logging.WARNING):
        search_experts(search(zoo, tmp_path / "out", experts=[zoo / "code", tmp_path / "other"], evaluations=5))
    assert "other: its config differs from that of" in caplog.text
    assert "in rms_norm_eps" in caplog.text


def test_folders_that_are_no_experts(zoo, tmp_path):
    def refused(message: str, *folders: Path, **changes: object) -> None:
        experts = {"experts": list(folders)} if folders else {}
        given = search(zoo, **{"out": tmp_path / "out", **experts, **changes})
        with pytest.raises(ConfigError, match=message):
            search_experts(given)

    code, adapter = zoo / "code", zoo / "adapter0"
    refused(r"1 expert: there is nothing to combine", code)
    refused(r"an expert is given twice", code, zoo / "law" / ".." / "code")
    refused(r"nowhere: holds neither model.safetensors nor adapter_model.safetensors", code, tmp_path / "nowhere")
    refused(r"one of it and .*code is an adapter; merge it", code, adapter)
    refused(r"--base .*adapter0: is an adapter; leave it out", base=adapter)
    refused(r"--base .*base: the experts are adapters", adapter, zoo / "adapter1", base=zoo / "base")
    refused(r"--out .*code: is the folder of an expert", out=code)
    (tmp_path / "file").touch()
    refused(r"--out .*file: is a file", out=tmp_path / "file")

    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}))
    Expert.open(other)
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    refused(r"other: lora_alpha = 99, and 8 in .*adapter0; give experts", adapter, other)
    (other / "adapter_config.json").write_text("[]")
    refused(r"adapter_config.json: holds no JSON object", adapter, other)
    (other / "adapter_model.safetensors").write_bytes(b"nonsense")
    (other / "adapter_config.json").write_text(json.dumps(config))
    refused(r"adapter_model.safetensors: cannot be read", adapter, other)

    for name in ("code", "law"):
        copy = shutil.copytree(zoo / name, tmp_path / name)
        own = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(own | {"architectures": ["OwnModel"]}))
    refused(r"code: its class is OwnModel, which transformers does not have", tmp_path / "code", tmp_path / "law")
    (tmp_path / "code" / "config.json").unlink()
    refused(r"config.json: cannot be read", tmp_path / "code", tmp_path / "law")


def test_names_that_are_not_those_in_memory(zoo, tmp_path):
    for name in NAMES:
        copy = shutil.copytree(zoo / name, tmp_path / name)
        renamed = {key.removeprefix("model."): tensor for key, tensor in written(copy).items()}
        save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"is not the same in the files and in memory \(LlamaForCausalLM\)"):
        search_experts(search(tmp_path, tmp_path / "out"))


def test_a_pickle_is_not_opened(zoo, tmp_path):
    for name in ("code", "law"):
        (tmp_path / name).mkdir()
        shutil.copy(zoo / name / "config.json", tmp_path / name)
        torch.save(written(zoo / name), tmp_path / name / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="older ones hold pickles, which are not read"):
        search_experts(search(tmp_path, tmp_path / "out", experts=[tmp_path / "code", tmp_path / "law"]))
