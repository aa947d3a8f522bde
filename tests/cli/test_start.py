"""Commands that need no engine import neither torch nor DeepSpeed, and print nothing but their output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ds_pso

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "ds_config_examples/zero2_delayed.json")
LINK = ("--parameters", "7.5M", "--bandwidth", "100M", "--step-seconds", "0.43")
MODEL = ("--model", "llama:2x64", "--gpus", "8xH100", "--tokens", "4k", "--bandwidth", "1gbit")
COMMANDS = {
    "help": ["--help"],
    **{
        f"help of {name}": [name, "--help"]
        for name in ("check", "plan", "simulate", "launch", "report", "export", "search")
    },
    "check": ["check", CONFIG],
    "check with parameters": ["check", CONFIG, "--parameters", "350M"],
    "check with a Llama": ["check", CONFIG, "--model", "llama:2x64"],
    "plan": ["plan", CONFIG, *LINK],
    "plan with GPUs": ["plan", *MODEL],
}
START = "import sys; from ds_pso.cli.main import main"
CHECK = "print(*sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)), sep='\\n', file=sys.stderr, end='')"


def imported_by(arguments: list[str]) -> str:
    """Run the command; return its standard error, and after it the heavy packages that it has imported."""
    code = f"{START}\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n{CHECK}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    return done.stderr


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_nothing_heavy_is_imported_and_nothing_warned_of(arguments: list[str]) -> None:
    assert imported_by(arguments) == ""


@pytest.mark.slow
def test_json_is_all_that_a_model_adds(tmp_path: Path) -> None:
    """One that is not counted by hand takes Accelerate, which imports DeepSpeed, and that looks for a GPU on stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}')
    code = f"{START}; main(['check', {CONFIG!r}, '--model', {str(tmp_path)!r}, '--json'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["model"]["parameters"] > 50_257 * 16


def test_nor_by_a_report(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 4, "time_s": 1.0, "losses": [2.0, 3.0]}\n')
    assert imported_by(["report", str(tmp_path)]) == ""
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ds_pso.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(ds_pso)
    assert getattr(ds_pso, name) is not None


def test_a_missing_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ds_pso' has no attribute 'Swram'"):
        _ = ds_pso.Swram


@pytest.mark.slow
def test_a_name_is_a_function_whatever_was_imported_before() -> None:
    code = "from ds_pso.simulation import simulate_script; import ds_pso; assert callable(ds_pso.simulate)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
