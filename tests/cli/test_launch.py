"""``ds-pso launch``: what is refused before anything is started, and what each particle is given."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_pso.cli import launch
from ds_pso.cli import main as cli
from ds_pso.elastic.supervisor import Supervisor


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.touch()
    return path


def write(folder: Path, **section: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"swarm": {"transport": "elastic", **section}}))
    return str(path)


def supervisor(*words: Any) -> Supervisor:
    return launch.supervisor_of(cli._parser().parse_args(["launch", *map(str, words)]))


REFUSED = [
    (["--particles", 0], "--particles = 0: must be at least 1"),
    (["--particles", 2, "--gpus-per-particle", 0], "--gpus-per-particle = 0: must be at least 1"),
    (["--particles", 2, "--start", 3], "--start 3: must lie between 1 and --particles = 2"),
    *[
        (["--particles", 4, "--only", only], f"--only {only}: must be a place")
        for only in ("4", "2-1", "-1", "a", "0,1")
    ],
    (["--particles", 2, "--host", "0.0.0.0"], "would listen on every network"),
    (["--particles", 2, "--host", "::"], "would listen on every network"),
    (["--particles", 2, "--host", "no.such.host.invalid"], "not an address or name"),
    *[
        (["--particles", 2, "--lighthouse", url], f"--lighthouse {url}: must be like")
        for url in ("10.0.0.1:29510", "http://10.0.0.1", "ftp://10.0.0.1:3", "http://10.0.0.1:port")
    ],
    (["--particles", 2, "--lighthouse", "http://10.0.0.1:29510"], "could not reach this one at --host 127.0.0.1"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: " ".join(map(str, value)) if value else "")
def test_bad_arguments(words: list[Any], said: str, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", *map(str, words), str(script)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ds-pso: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_no_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--particles", "2", str(tmp_path / "none.py")]) == 1
    assert "none.py: no such script" in capsys.readouterr().err


def test_the_json_must_be_elastic(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, transport="static")
    assert cli.main(["launch", "--particles", "2", str(script), "--deepspeed_config", config]) == 1
    assert 'swarm.transport = "static"' in capsys.readouterr().err


def test_the_lighthouse_waits_as_the_json_says(script: Path, tmp_path: Path) -> None:
    config = write(tmp_path, timeout_s=50, elastic={"heartbeat_s": 3})
    lighthouse = supervisor("--particles", 2, script, "--deepspeed_config", config).lighthouse
    assert lighthouse is not None
    assert (lighthouse.join_s, lighthouse.heartbeat_s, lighthouse.url) == (50, 3, "http://127.0.0.1:29510")
    config = write(tmp_path, elastic={"straggler": "skip", "straggler_s": 7})
    lighthouse = supervisor("--particles", 2, "--config", config, "--port", 1234, script).lighthouse
    assert lighthouse is not None
    assert (lighthouse.join_s, lighthouse.port) == (7, 1234)


def test_who_joins_starts_no_lighthouse(script: Path) -> None:
    joins = supervisor("--particles", 8, "--only", "4-7", "--lighthouse", "http://127.0.0.1:5", "--start", 4, script)
    assert joins.lighthouse is None
    assert list(joins.particles) == [4, 5, 6, 7]
    assert joins.env["DS_PSO_LIGHTHOUSE"] == "http://127.0.0.1:5"
    assert (joins.env["DS_PSO_PARTICLES"], joins.env["DS_PSO_START"]) == ("8", "4")


@pytest.mark.parametrize("visible", [None, "3,5,6,7"])
def test_each_particle_has_its_own_gpus(script: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started = supervisor("--particles", 6, "--only", "2-3", "--gpus-per-particle", 2, script)
    names = (visible or "0,1,2,3").split(",")
    assert started.devices == {2: names[:2], 3: names[2:]}
    (world,) = (word.removeprefix("--world_info=") for word in started._command_of(3)() if "world_info" in word)
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [int(names[2]), int(names[3])]}
    assert cli.main(["launch", "--particles", "3", "--gpus-per-particle", "2", str(script)]) == 1
