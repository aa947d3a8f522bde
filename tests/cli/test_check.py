"""``ds-pso check``: what it prints, warns of and refuses, and its numbers against the formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from ds_pso.cli import main as cli

ROOT = Path(__file__).parents[2]


def write(folder: Path, config: dict[str, Any] | None = None, **keys: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"swarm": {"particles": 2, **keys}, **(config or {})}))
    return str(path)


def check(capsys: Any, *argv: str) -> dict[str, Any]:
    """What it says with --json; it must be all that it prints."""
    assert cli.main(["check", *argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_config_examples/*.json")), ids=lambda path: path.stem)
def test_every_example_is_valid_and_meant(path: Path, capsys: Any) -> None:
    found = check(capsys, str(path))
    allowed = ["ignores particles, sync_interval"] if "allreduce" in path.stem else []
    assert len(found["warnings"]) == len(allowed)
    assert all(text in warning for text, warning in zip(allowed, found["warnings"], strict=True))


def test_settings_are_resolved_and_defaults_are_marked(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path, sync_mode="diloco", diloco={"outer_lr": 0.5}, schedule={"warmup_steps": 3})
    found = check(capsys, config)
    assert found["swarm"]["particles"] == 2
    assert found["swarm"]["diloco"] == {"outer_lr": 0.5, "outer_momentum": "auto", "merge": "mean"}
    assert found["swarm"]["sync_interval"] == 32
    assert {"sync_interval", "wire", "diloco.outer_momentum", "schedule.type"} <= set(found["defaults"])
    assert not {"particles", "sync_mode", "diloco.outer_lr", "schedule.warmup_steps"} & set(found["defaults"])
    assert "model" not in found
    assert cli.main(["check", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{config}: valid"
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert rows["particles"] == ["2"]
    assert rows["sync_interval"] == ["32", "(default)"]
    assert rows["diloco.outer_lr"] == ["0.5"]
    assert rows["sync_mode"] == ['"diloco"']


@pytest.mark.parametrize(
    ("keys", "received", "kept", "exchange"),
    [
        # M = 8e6, P = 4, S = 2, so N = 4e6. By hand, from the formulas of docs/slow-networks.md.
        ({}, 8 * 8e6 * 3 / 4, 0, 4 * 4e6),
        ({"sync_mode": "pso"}, 4 * 8e6, 0, 4 * 4e6),
        ({"sync_mode": "diloco"}, 8 * 8e6 * 3 / 4, 8 * 4e6, 4 * 4e6),
        ({"sync_mode": "easgd"}, 8 * 8e6 * 3 / 4, 4 * 4e6, 4 * 4e6),
        ({"wire": "bf16"}, 2 * 2 * 8e6 * 3 / 4, 8 * 4e6, (4 + 2 * (2 - 1 / 4)) * 4e6),
        (
            {"wire": "int4", "state_dtype": "bf16"},
            2 * (1 / 2 + 1 / 64) * 8e6 * 3 / 4,
            6 * 4e6,
            (4 + (1 / 2 + 1 / 64) * (2 - 1 / 4)) * 4e6,
        ),
        ({"bucket_mb": 1.0}, 8 * 8e6 * 3 / 4, 0, 2**20),
    ],
)
def test_bytes_and_memory_by_hand(tmp_path, capsys, keys, received, kept, exchange) -> None:
    config = write(tmp_path, bucket_mb=64.0) if not keys else write(tmp_path, **keys)
    found = check(capsys, config, "--parameters", "8M", "--particles", "4", "--ranks", "2")["model"]
    assert (found["parameters"], found["particles"], found["ranks"], found["name"]) == (8e6, 4, 2, None)
    assert found["sync_point"] == pytest.approx({"per_particle": received, "per_rank": received / 2, "moments": 0})
    assert found["memory"] == pytest.approx({"kept": kept, "pending": 0, "exchange": exchange})


def test_one_particle_keeps_what_its_rule_keeps_and_moves_nothing(tmp_path: Path, capsys: Any) -> None:
    """Anchor and momentum of N = 4e6, and a copy of a shard's bucket; what is for peers does not count."""
    plain = write(tmp_path, particles=1, sync_mode="diloco", bucket_mb=1.0)
    found = check(capsys, plain, "--parameters", "8M", "--ranks", "2")["model"]
    assert found["sync_point"] == {"per_particle": 0.0, "per_rank": 0.0, "moments": 0.0}
    assert found["memory"] == {"kept": 8 * 4e6, "pending": 0.0, "exchange": 2**20}
    more = {"wire": "int4", "delay": 2, "diloco": {"merge": "mean"}}
    odd = write(tmp_path, particles="node", sync_mode="diloco", bucket_mb=1.0, **more)
    assert check(capsys, odd, "--parameters", "8M", "--ranks", "2", "--particles", "1")["model"] == found


def test_numbers_for_people(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path, sync_mode="diloco", delay=2)
    assert cli.main(["check", config, "--parameters", "8M", "--ranks", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "8 M parameters, 2 particles of 2",
        "  a sync point   32 MB into each particle, 16 MB into each rank",
        "  memory         32 MB on each rank beside DeepSpeed's own",
        "                 16 MB more while a sync point is pending",
        "                 16 MB more during a sync",
    ]


def test_models(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path)
    layer = 4 * 128 * 128 + 3 * 128 * 320 + 2 * 128
    found = check(capsys, config, "--model", "llama:4x128")["model"]
    assert (found["name"], found["parameters"]) == ("llama:4x128", 4096 * 128 + 4 * layer + 128)
    LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path / "model")
    found = check(capsys, config, "--model", str(tmp_path / "model"))["model"]
    assert found["parameters"] == 37 * 16 * 2 + 2 * (4 * 16 * 16 + 3 * 16 * 20 + 2 * 16) + 16


@pytest.mark.parametrize(
    "keys",
    [
        {"particles": 1},
        {"sync_mode": "allreduce"},
        {"particles": 1, "sync_mode": "diloco", "diloco": {"outer_lr": 1, "outer_momentum": 0}},
    ],
)
def test_without_sync_points(tmp_path: Path, capsys: Any, keys: dict[str, Any]) -> None:
    config = write(tmp_path, **keys)
    found = check(capsys, config, "--parameters", "8M")["model"]
    assert (found["memory"], found["sync_point"]) == (None, None)
    assert cli.main(["check", config, "--parameters", "8M"]) == 0
    assert "no sync points, and nothing beside what DeepSpeed takes" in capsys.readouterr().out


WARNINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"pso": {"inertia": 0.5}}, {}, 'swarm.pso is not used: swarm.sync_mode is "local_sgd"'),
    ({"sparse": {"bits": 1}}, {}, 'swarm.sparse is not used: swarm.wire is "fp32"'),
    ({"particles": 1}, {}, "swarm.particles = 1: plain DeepSpeed"),
    (
        {"particles": 1, "sync_mode": "diloco", "sync_interval": 8, "wire": "int4", "delay": 8},
        {},
        "one particle has nobody to exchange with, so these have no effect: swarm.wire, swarm.delay",
    ),
    ({"sync_mode": "allreduce"}, {}, "and ignores particles"),
    ({"sync_interval": 1}, {}, "swarm.sync_interval = 1: the particles sync at every step"),
    ({"sync_interval": 8, "delay": 8}, {}, "swarm.delay = 8: as long as the interval"),
    ({"sync_interval": 8, "delay": 2, "fragments": 4, "streaming": True}, {}, "swarm.delay = 2: as long as"),
    ({"fitness": "probe"}, {}, 'and "local_sgd" does not rank particles'),
    ({"timeout_s": 5.0}, {}, "swarm.timeout_s = 5: a rank that loads data"),
    (
        {"sync_interval": 100},
        {"scheduler": {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": 64}}},
        "swarm.sync_interval = 100: training ends after 64 steps",
    ),
]


@pytest.mark.parametrize(("keys", "more", "said"), WARNINGS)
def test_what_is_probably_not_meant(tmp_path, capsys, keys, more, said) -> None:
    config = write(tmp_path, more, **keys)
    (warning,) = check(capsys, config)["warnings"]
    assert said in warning
    assert cli.main(["check", config]) == 0, "a warning is no error"
    assert f"\nwarning: {warning}\n" in capsys.readouterr().out + "\n"


@pytest.mark.parametrize(
    ("keys", "arguments", "said"),
    [
        ({"sync_intervall": 8}, [], 'swarm.sync_intervall: unknown key; did you mean "sync_interval"?'),
        ({"delay": 64}, [], "swarm.delay = 64: the next sync point would come first"),
        (
            {"particles": "node"},
            ["--parameters", "1M"],
            'swarm.particles = "node": how many there will be is not known',
        ),
        ({}, ["--parameters", "0"], "--parameters = 0.0: must be at least 1"),
        ({}, ["--parameters", "1M", "--ranks", "0"], "--ranks = 0: must be at least 1"),
        ({}, ["--parameters", "1M", "--particles", "-2"], "--particles = -2: must be at least 1"),
        ({}, ["--model", "llama:4x33"], "--model llama:4x33: must be llama:<layers>x<width>"),
        ({}, ["--model", "no/such/folder/here"], "--model no/such/folder/here: its config cannot be loaded ("),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, keys, arguments, said) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["check", write(tmp_path, **keys), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ds-pso: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["check", str(tmp_path / "no.json")]) == 1
    assert "cannot read the DeepSpeed config (No such file or directory); check the path" in capsys.readouterr().err


def test_a_model_is_given_in_one_way(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["check", write(tmp_path), "--model", "llama:4x128", "--parameters", "1M"])
    assert end.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
