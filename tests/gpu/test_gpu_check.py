"""What runs the checks on a GPU: processes, limits, the table. And the checks themselves, on what device there is."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import gpu_check
import pytest
import torch
from variants import slow_but

from gpu import costs, features, training
from gpu.page import line, markdown, summary
from gpu.ranks import Outcome, Ranks
from gpu.table import CHECKS, Check

HOLDS = Check("fakes:holds", "all is well")
ON_GPU = torch.cuda.is_available()


def run(check: Check, folder: Path, limit_s: float = 30.0) -> Outcome:
    return Ranks(check, folder / check.name, "cpu").run(limit_s)


def test_a_check_that_holds_says_what_its_first_rank_found(tmp_path: Path) -> None:
    outcome = run(HOLDS, tmp_path)
    assert (outcome.state, outcome.found) == ("ok", "rank 0 of 2, 0 here")


def test_the_rank_that_has_found_it_is_named_and_others_are_not_waited_for(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = run(Check("fakes:fails_on_one_rank", ""), tmp_path)
    assert time.monotonic() - begin < 20
    assert (outcome.state, outcome.found) == ("failed", "ValueError: the second rank")
    assert "-- rank 0: still waiting" in outcome.detail
    assert "has found it" in outcome.detail


def test_a_check_that_hangs_is_ended_with_the_stacks_of_its_ranks(tmp_path: Path) -> None:
    outcome = run(Check("fakes:hangs", ""), tmp_path, limit_s=1.0)
    assert (outcome.state, outcome.found) == ("failed", "not done after 1 s")
    assert outcome.detail.count("in hangs") == 2, "a stack for each rank"


def test_a_rank_that_dies_has_failed(tmp_path: Path) -> None:
    outcome = run(Check("fakes:dies", ""), tmp_path)
    assert (outcome.state, outcome.found) == ("failed", "the process ended with exit code -9")


def test_what_cannot_be_asked_here_has_not_failed(tmp_path: Path) -> None:
    outcome = run(Check("fakes:cannot", ""), tmp_path)
    assert (outcome.state, outcome.found) == ("not tried", "there is no such device")


def test_a_check_that_cannot_be_imported_has_failed(tmp_path: Path) -> None:
    outcome = run(Check("fakes:missing", ""), tmp_path)
    assert outcome.state == "failed"
    assert "AttributeError" in outcome.found


def test_nothing_that_a_check_has_started_is_left(tmp_path: Path) -> None:
    run(Check("fakes:starts_others", ""), tmp_path, limit_s=1.0)
    children = [int(path.read_text()) for path in tmp_path.rglob("child_*")]
    assert len(children) == 2
    time.sleep(0.2)
    for child in children:
        stat = Path(f"/proc/{child}/stat")
        assert not stat.exists() or stat.read_text().split()[2] == "Z", "it still runs"


def test_one_check_stops_no_other(tmp_path: Path) -> None:
    checks = [Check("fakes:hangs", "", limit_s=1.0), Check("fakes:dies", ""), HOLDS]
    rows = list(gpu_check.run_checks(checks, "cpu", 60.0, tmp_path))
    assert [outcome.state for _, outcome in rows] == ["failed", "failed", "ok"]


def test_what_no_longer_fits_into_the_time_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_LEAST_S", 1.0)
    checks = [HOLDS, Check("fakes:hangs", ""), Check("fakes:cannot", ""), Check("fakes:dies", "")]
    begin = time.monotonic()
    rows = list(gpu_check.run_checks(checks, "cpu", 4.0, tmp_path))
    assert time.monotonic() - begin < 10
    assert [outcome.state for _, outcome in rows] == ["ok", "not tried", "not tried", "not tried"]
    assert "not to its end" in rows[1][1].found
    assert rows[3][1].found == "no time was left"


def test_the_page_has_a_row_for_each_check_and_says_what_failed() -> None:
    rows = [
        (HOLDS, Outcome("ok", "a | b", 3.2)),
        (Check("fakes:dies", "it lives"), Outcome("failed", "exit code -9", 1.0, "the log\n```\nof it")),
        (Check("fakes:cannot", "it can"), Outcome("not tried", "no device")),
    ]
    page = markdown(rows, {"GPU": "H100", "torch": "2.11.0"})
    assert "on GPU H100, torch 2.11.0: 1 ok, 1 failed, 1 not tried" in page
    assert "| `holds` | all is well | ok | 3 | a \\| b |" in page
    assert "| `cannot` | it can | not tried |  | no device |" in page
    assert "## dies has failed\n\n```text\nthe log\n'''\nof it\n```" in page
    assert summary(rows) == "1 ok, 1 failed, 1 not tried"
    assert line(*rows[1]).split() == ["failed", "1", "s", "dies", "exit", "code", "-9"]


def test_wheels_are_unpacked_and_found(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "")
    found = gpu_check.unpack(tmp_path / "wheels", tmp_path / "packages")
    assert (found / "some/__init__.py").exists()


def test_every_check_has_a_body_and_a_name_of_its_own() -> None:
    modules = {"training": training, "features": features, "costs": costs}
    for check in CHECKS:
        assert callable(getattr(modules[check.body.partition(":")[0]], check.name))
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_the_command_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", [HOLDS, Check("fakes:dies", "")])
    monkeypatch.setattr(gpu_check, "_VERSIONS", """print('noise'); print('{"GPU": "", "torch": "2.11.0"}')""")
    page = tmp_path / "new" / "page.md"
    arguments = ["--device", "cpu", "--output", str(page), "--wheels", str(tmp_path / "none")]
    assert gpu_check.main([*arguments, "--only", "holds"]) == 0
    assert "on torch 2.11.0: 1 ok, 0 failed, 0 not tried" in page.read_text()
    assert "1 ok, 0 failed, 0 not tried" in capsys.readouterr().out
    assert gpu_check.main(arguments) == 1
    assert "| `dies` |" in page.read_text()


NOT_ON_A_CPU = {"fused_adam", "cpu_adam", "nvme_offload", "peers_over_nccl", "particles_over_nccl", "marked_tests"}


@pytest.mark.parametrize("name", slow_but(["nccl"], [check.name for check in CHECKS if check.name not in NOT_ON_A_CPU]))
@pytest.mark.skipif(ON_GPU, reason="test_on_the_gpu asks there")
def test_on_a_cpu(tmp_path: Path, name: str) -> None:
    check = next(check for check in CHECKS if check.name == name)
    outcome = Ranks(check, tmp_path / name, "cpu").run(240)
    assert outcome.state == "ok", f"{outcome.found}\n{outcome.detail}"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("check", [check for check in CHECKS if check.name != "marked_tests"], ids=lambda c: c.name)
def test_on_the_gpu(tmp_path: Path, check: Check) -> None:
    outcome = Ranks(check, tmp_path / check.name, "cuda").run(check.limit_s)
    if outcome.state == "not tried":
        pytest.skip(outcome.found)
    assert outcome.state == "ok", f"{outcome.found}\n{outcome.detail}"
