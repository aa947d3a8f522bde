"""``ds-pso plan``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pool import Pool

from ds_pso.cli import main as cli
from ds_pso.cli.arguments import bit_rate, duration, quantity
from ds_pso.cli.gpus import PEAK_TFLOPS, Gpus, gpus, step_seconds
from ds_pso.config.load import load_config
from ds_pso.training.arguments import parse_arguments, read_deepspeed_config

LINK = ["--bandwidth", "100M"]
STEP = ["--parameters", "7.5M", "--step-seconds", "0.43"]
ARGUMENTS = [*STEP, *LINK]


def write(folder: Path, **keys: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "swarm": {"particles": 2, **keys}}))
    return str(path)


def plan(capsys: Any, *argv: str) -> str:
    assert cli.main(["plan", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of the table by the name of their line; units are part of a cell."""
    lines = printed.split("\n\n")[1].splitlines()[2:]
    return {line.split("  ")[0]: [cell for cell in line.split("  ")[1:] if cell] for line in lines}


# -- what is printed --------------------------------------------------------------------------


def test_a_table_for_a_link(capsys: Any) -> None:
    """By hand: 45 MB at every step, 3.6 s; 30 MB every 32 steps, 2.4 s; 3.87 MB in int4."""
    printed = plan(capsys, *ARGUMENTS)
    assert printed.startswith(
        "7.5 M parameters, 2 particles of 1, 100 Mbit/s into each particle\na step takes 0.43 s: as given\n"
    )
    found = {name: [cell.strip() for cell in cells] for name, cells in rows(printed).items()}
    assert found["ZeRO 2, every step, 32-bit gradients"] == ["10.7 %", "45", "-", "15.9 Gbit/s"]
    assert found["ZeRO 2, every step, 16-bit gradients"] == ["15.2 %", "30", "-", "10.6 Gbit/s"]
    assert found["local_sgd, n = 32, fp32"] == ["85.1 %", "0.938", "107", "331 Mbit/s"]
    assert found["local_sgd, n = 32, int4"][:3] == ["97.8 %", "0.121", "14"]
    assert "the config" not in printed
    assert '"swarm": {"particles": 2, "sync_mode": "local_sgd", "sync_interval": 4, "wire": "sparse"}' in printed
    assert "without a delay 95 % takes an interval of 107 in fp32, 14 in int4, 4 in sparse" in printed


def test_days_and_bytes_of_a_billion_tokens(capsys: Any) -> None:
    found = rows(plan(capsys, *ARGUMENTS, "--tokens", "1000"))
    steps = 1e9 / 2000
    _, _, gigabytes, days, *_ = (cell.strip() for cell in found["local_sgd, n = 32, fp32"])
    assert float(gigabytes) == pytest.approx(steps * 30e6 / 32 / 1e9, rel=0.01)
    assert float(days) == pytest.approx(steps * (0.43 + 2.4 / 32) / 86400, rel=0.01)


def test_the_section_of_the_config_is_a_row(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path, sync_mode="diloco", sync_interval=16, wire="int8", delay=1)
    assert "the config: diloco, n = 16, int8, delay 1" in rows(plan(capsys, config, *ARGUMENTS))
    assert "the config" not in plan(capsys, write(tmp_path, sync_mode="allreduce"), *ARGUMENTS)


def test_rows_that_the_mode_excludes_are_left_out(tmp_path: Path, capsys: Any) -> None:
    ring = write(tmp_path, sync_mode="pso", pso={"topology": "ring"})
    names = rows(plan(capsys, ring, *ARGUMENTS)).keys()
    assert any(name.startswith("pso, n = 32, fp32") for name in names)
    assert not any("int4" in name for name in names)


def test_a_link_that_carries_nothing_or_everything(capsys: Any) -> None:
    assert "nothing leaves 95 % on this link" in plan(capsys, *STEP, "--bandwidth", "1k")
    everything = plan(capsys, *STEP, "--bandwidth", "400G")
    assert '"swarm": {"sync_mode": "allreduce"}\n  leaves 99.' in everything
    half = plan(capsys, *STEP, "--bandwidth", "11G")
    assert '  "communication_data_type": "bf16"' in half
    far = plan(capsys, *STEP, "--bandwidth", "400G", "--latency", "10s")
    assert rows(far)["local_sgd, n = 32, fp32"][-1].strip() == "-", "no bandwidth is enough"


def test_backend(tmp_path: Path, capsys: Any) -> None:
    """Between two ranks gloo's all-gather takes turns: 60 MB's time for 45 MB."""
    gloo = rows(plan(capsys, write(tmp_path, peer_backend="gloo"), *ARGUMENTS))
    share = 0.43 / (0.43 + 60e6 * 8 / 100e6)
    assert gloo["ZeRO 2, every step, 32-bit gradients"][0].strip() == f"{100 * share:.1f} %"


# -- model and step ---------------------------------------------------------------------------


def test_gpus_and_a_model(capsys: Any) -> None:
    printed = plan(capsys, "--model", "llama:4x128", "--gpus", "8xH100", "--tokens", "256k", *LINK)
    assert "llama:4x128: 1.28 M parameters, 2 particles of 8" in printed
    assert "6 x 1.28 M x 256,000 tokens at 40 % of 8 x 989 TFLOP/s" in printed
    assert "16-bit gradients" in printed
    assert "32-bit gradients" not in printed, "GPUs train in bf16"


def test_flops_by_hand() -> None:
    assert step_seconds(1e9, 1e6, Gpus(8, "H100"), 0.4) == pytest.approx(6e15 / (0.4 * 8 * 989e12))
    assert gpus("8xH100") == gpus("8 x nvidia h100") == Gpus(8, "H100")
    assert gpus("2xh100 pcie") == Gpus(2, "H100-PCIe")
    assert gpus("4x4090") == gpus("4xRTX 4090") == Gpus(4, "RTX4090")
    assert gpus("A100").number == 1
    assert all(gpus(name).name == name for name in PEAK_TFLOPS)


def measured(folder: str) -> tuple[int, float]:
    import contextlib
    import io

    out = io.StringIO()
    config = Path(folder, "config.json")
    config.write_text('{"train_micro_batch_size_per_gpu": 2, "swarm": {"particles": 2}}')
    with contextlib.redirect_stdout(out):
        code = cli.main(["plan", str(config), "--model", "llama:1x32", "--measure", "--tokens", "96", *LINK])
    line = next(line for line in out.getvalue().splitlines() if line.startswith("a step takes"))
    assert "measured with 96 tokens on one rank" in line
    assert "0.141 M parameters" in out.getvalue()
    return code, float(line.split()[3])


def test_a_step_is_measured(pool: Pool, tmp_path: Path) -> None:
    ((code, seconds),) = pool.run(measured, str(tmp_path), world_size=1)
    assert code == 0
    assert 0 < seconds < 10


# -- the file that is written -----------------------------------------------------------------


def test_the_config_is_written_whole(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path, sync_mode="diloco", sync_interval=16, bucket_mb=32.0)
    target = tmp_path / "planned.json"
    assert f"written: {target}" in plan(capsys, source, *ARGUMENTS, "--write", str(target))
    config, swarm = load_config(target)
    assert config == {"zero_optimization": {"stage": 2}}
    assert (swarm.sync_mode, swarm.sync_interval, swarm.wire, swarm.bucket_mb) == ("diloco", 4, "sparse", 32.0)
    assert json.loads(Path(source).read_text())["swarm"]["sync_interval"] == 16, "the given file is as it was"


def test_without_a_config_it_is_that_of_train_py(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "planned.json"
    argv = ["--model", "llama:4x128", "--gpus", "2xA100", "--tokens", "4k", *LINK, "--particles", "4"]
    plan(capsys, *argv, "--write", str(target))
    written = json.loads(target.read_text())
    built_in = read_deepspeed_config(None, 2)
    assert {**written, "swarm": None} == {**built_in, "swarm": None, "bf16": {"enabled": True}}
    assert load_config(target)[1].particles == 4
    assert parse_arguments(["--deepspeed_config", str(target)])


def test_a_config_without_a_section_gets_one(tmp_path: Path, capsys: Any) -> None:
    source, target = tmp_path / "plain.json", tmp_path / "planned.json"
    source.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": 8}')
    printed = plan(capsys, str(source), *ARGUMENTS, "--particles", "3", "--write", str(target))
    assert "ZeRO 3, every step" in printed
    assert "the config" not in printed
    assert load_config(target)[0] == json.loads(source.read_text())
    assert load_config(target)[1].particles == 3


def test_no_file_is_written_over(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path)
    before = Path(config).read_text()
    assert cli.main(["plan", config, *ARGUMENTS, "--write", config]) == 1
    assert "exists already; give the name of a new file" in capsys.readouterr().err
    assert Path(config).read_text() == before
    assert cli.main(["plan", config, *ARGUMENTS, "--write", str(tmp_path / "none" / "a.json")]) == 1
    assert "cannot be written (No such file or directory); give a file in a folder that exists" in (
        capsys.readouterr().err
    )


# -- what makes no sense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "arguments", "said"),
    [
        ({"optimizer_state": "average"}, [], 'swarm.optimizer_state = "average": how many moments travel depends'),
        ({"particles": "node"}, [], 'swarm.particles = "node": how many there will be is not known here'),
        ({"particles": 1}, [], "with one particle nothing crosses a link, so there is nothing to plan; give more"),
        ({}, ["--particles", "1"], "with one particle nothing crosses a link"),
        ({}, ["--ranks", "0"], "--ranks = 0: must be at least 1"),
        ({}, ["--parameters", "0"], "--parameters = 0.0: must be at least 1"),
        ({}, ["--tokens", "0"], "--tokens = 0.0: must be at least 1"),
        ({}, ["--bandwidth", "0"], "--bandwidth = 0: must be above 0"),
        ({}, ["--step-seconds", "0"], "--step-seconds = 0: must be above 0"),
        ({"wire": "int3"}, [], "swarm.wire = 'int3': must be"),
    ],
)
def test_it_is_said_in_one_line(tmp_path, capsys, keys, arguments, said) -> None:
    assert cli.main(["plan", write(tmp_path, **keys), *ARGUMENTS, *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parameters", "1B", "--gpus", "8xH100"], "--gpus: how many tokens a step has is not known; add --tokens"),
        (["--model", "llama:1x32", "--measure"], "--measure: how many tokens a step has is not known; add --tokens"),
        (
            ["--parameters", "1B", "--measure", "--tokens", "1k"],
            "--measure: there is no model to train; give --model instead of --parameters",
        ),
        (
            ["--parameters", "1B", "--gpus", "8xH100", "--tokens", "1k", "--ranks", "4"],
            "--ranks = 4: --gpus has 8 of them; leave --ranks out",
        ),
        (["--model", "llama:1x31", "--step-seconds", "1"], "with a width that 32 divides"),
    ],
)
def test_what_does_not_go_together(capsys: Any, arguments: list[str], said: str) -> None:
    assert cli.main(["plan", *arguments, *LINK]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        *(
            ("--parameters", text, "must be a number such as 0.5")
            for text in ("", "fast", "-1", "nan", "inf", "1X", "M")
        ),
        *(
            ("--bandwidth", text, "must be a bandwidth in bits, such as 100M, 1gbit or 100Mbit/s")
            for text in ("", "fast", "-1", "nan", "inf", "1X", "M", "100MB/s", "12.5MB", "1.2.3G", "100 M bit")
        ),
        *(
            ("--latency", text, "must be a time such as 0.5, 20ms or 300us")
            for text in ("", "soon", "-1", "5min", "ms", "1..2")
        ),
        ("--gpus", "8xB9000", "must be a number and a name such as 8xH100, of A10, "),
        ("--gpus", "0xH100", "for others give --step-seconds"),
        *(("--share", text, "must lie between 0 and 1") for text in ("0", "1", "95")),
        ("--mfu", "40", "must lie between 0 and 1"),
    ],
)
def test_values_that_are_none(capsys: Any, option: str, text: str, said: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", f"{option}={text}"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_model_and_step_are_needed_once(capsys: Any) -> None:
    for arguments in (LINK, [*ARGUMENTS, "--measure"], [*ARGUMENTS, "--model", "llama:1x32"], STEP):
        with pytest.raises(SystemExit):
            cli.main(["plan", *arguments])
    assert "required" in capsys.readouterr().err


def test_units() -> None:
    assert [quantity(text) for text in ("2", "2k", "2M", "2G", "2B", "2T", "1e-3")] == [
        *(2, 2e3, 2e6, 2e9, 2e9, 2e12),
        1e-3,
    ]
    assert math.isclose(quantity("1.3B"), 1.3e9)
    for text in ("100M", "100m", "100mbit", "100Mbit/s", "100 Mbit/s", "100Mbps", "100Mb/s", "0.1gbit", "1e8"):
        assert bit_rate(text) == pytest.approx(1e8), text
    assert (bit_rate("10G"), bit_rate("1gbit"), bit_rate("500kbit")) == (1e10, 1e9, 5e5)
    assert [duration(text) for text in ("0.02", "20ms", "20 ms", "2s", "300us")] == pytest.approx(
        [0.02, 0.02, 0.02, 2, 3e-4]
    )
