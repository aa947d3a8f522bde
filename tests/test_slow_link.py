"""The slow link between two namespaces is as slow as it says, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.slow_link import network
from benchmarks.slow_link.ends import run_ends
from benchmarks.slow_link.report import write_report
from benchmarks.slow_link.results import Measured, SlowLinkTable
from benchmarks.slow_link.runs import BANDWIDTHS, Run, runs
from benchmarks.slow_link.stacks import build_model, fragments_of

REASON = network.why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))

RECEIVE = """
import socket, sys, time
from benchmarks.slow_link.network import received_bytes
server = socket.create_server((sys.argv[1], 5000))
begin, count, before = time.perf_counter(), 0, received_bytes()
print("listening", flush=True)
peer, _ = server.accept()
while part := peer.recv(1 << 16):
    count += len(part)
print(count, received_bytes() - before, time.perf_counter() - begin, flush=True)
"""
SEND = "import socket, sys; socket.create_connection((sys.argv[1], 5000)).sendall(bytes(int(sys.argv[2])))"


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_namespaces
def test_the_link_is_as_slow_as_it_says_and_goes_away() -> None:
    numel = 1_000_000
    with network.slow_link(8e6) as link:  # a second for a million bytes
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": str(root)}
        receiver = subprocess.Popen(
            link.command(0, sys.executable, "-c", RECEIVE, link.addresses[0]),
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        subprocess.run(link.command(1, sys.executable, "-c", SEND, link.addresses[0], str(numel)), check=True)
        count, on_interface, seconds = map(float, receiver.communicate(timeout=60)[0].split())
        assert all(name in namespaces() for name in link.namespaces)
    assert count == numel
    assert numel < on_interface < 1.1 * numel, "with headers"
    assert seconds > 0.9, "never faster; slower if the machine is busy"
    assert not any(name in namespaces() for name in link.namespaces)


@needs_namespaces
def test_a_failure_leaves_no_namespace_behind() -> None:
    before = namespaces()
    with pytest.raises(ZeroDivisionError), network.slow_link(1e6):
        _ = 1 / 0
    assert namespaces() == before


@needs_namespaces
def test_what_was_left_behind_goes_away() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = f"ds_pso_{dead.pid}_0"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with network.slow_link(1e6) as link:
        there = namespaces()
    assert left not in there
    assert all(name in there for name in link.namespaces)


END = """
import os, sys, time
from benchmarks.slow_link.ends import tell
end = int(os.environ["RANK"])
if sys.argv[1] == "fail" and end == 1:
    sys.exit("out of luck")
time.sleep(60 * (sys.argv[1] == "fail"))
tell({"end": end, "told": sys.argv[1], "address": os.environ["ADDRESS"]})
"""


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that an end can run."""
    (tmp_path / "an_end.py").write_text(END)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    return "an_end"


def test_both_ends_tell_what_they_found(ends: str) -> None:
    found = run_ends(network.loopback(29500), ends, "well", 60)
    assert found == [{"end": end, "told": "well", "address": "127.0.0.1"} for end in range(2)]


def test_who_has_failed_is_not_waited_for(ends: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="out of luck"):
        run_ends(network.loopback(29500), ends, "fail", 600)
    assert time.monotonic() - begin < 50


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.sys, "platform", "darwin")
    assert network.why_not() == "network namespaces exist on Linux only"
    monkeypatch.setattr(network.sys, "platform", "linux")
    monkeypatch.setattr(network.shutil, "which", lambda name: None)
    assert network.why_not() == "the programs ip and tc are missing; install iproute2"
    monkeypatch.setattr(network.shutil, "which", lambda name: name)
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    assert network.why_not() == "creating network namespaces needs root"
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)

    def refuse(*command: str) -> None:
        raise RuntimeError(f"{' '.join(command[:3])}: Operation not permitted")

    monkeypatch.setattr(network, "_run", refuse)
    assert network.why_not() == "no slow link can be made: ip netns add: Operation not permitted"


def test_every_run_has_its_stack_alone_in_the_same_repetition() -> None:
    wanted = list(runs(2))
    assert len(set(wanted)) == len(wanted)
    assert {run.alone for run in wanted} <= set(wanted)
    assert {run.number for run in wanted} == {2}
    assert {run.bandwidth for run in wanted if run.talks} == set(BANDWIDTHS)
    for run in wanted:
        warmup, measured = run.steps
        assert not run.talks or (warmup % run.interval, measured % run.interval) == (0, 0)
        assert (warmup % run.accumulation, measured % run.accumulation) == (0, 0), "whole optimizer steps"
        if run.stack == "torchft":
            assert run.delay < run.interval // run.fragments, "as torchft demands"


def test_torchft_has_a_delay_and_fragments_at_every_link_and_interval() -> None:
    torchft = [run for run in runs(0) if run.stack == "torchft" and run.rule == "diloco" and run.talks]
    for bandwidth in BANDWIDTHS:
        for interval in (8, 32):
            found = [run for run in torchft if (run.bandwidth, run.interval) == (bandwidth, interval)]
            assert {(run.delay > 0, run.fragments > 1) for run in found} == {
                (False, False),
                (True, False),
                (True, True),
            }


def test_accumulation_is_compared_with_accumulation() -> None:
    run = Run("DeepSpeed", "accumulation", stage=1, interval=8, wire="bf16")
    assert run.name == "DeepSpeed ZeRO 1 accumulation n=8 bf16"
    assert (run.alone.accumulation, run.alone.wire, run.alone.name) == (
        8,
        "fp32",
        "DeepSpeed ZeRO 1 accumulation, alone",
    )
    assert Run("DeepSpeed", interval=1).alone.accumulation == 1
    assert Run("DDP", interval=1, wire="PowerSGD").alone == Run("DDP", interval=1).alone


@pytest.mark.parametrize(("tied", "count"), [(False, 2), (False, 4), (True, 4)])
def test_fragments_are_the_model_once_in_parts_of_about_one_size(tied: bool, count: int) -> None:
    model = build_model()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    parts = [list(part.parameters()) for part in fragments_of(model, count)]
    assert [id(p) for part in parts for p in part] == [id(p) for p in model.parameters()]
    sizes = [sum(p.numel() for p in part) for part in parts]
    assert max(sizes) < 1.7 * sum(sizes) / count


def test_too_many_fragments_are_an_error() -> None:
    with pytest.raises(ValueError, match="make no 12 fragments; use fewer"):
        fragments_of(build_model(64), 12)


def test_shares_are_those_of_equal_repetitions(tmp_path: Path) -> None:
    table = SlowLinkTable(tmp_path / "slow_link.csv")
    for number, (alone_s, run_s) in enumerate([(1.0, 2.0), (3.0, 4.0), (1.0, 1.25)]):
        run = Run("ds_pso", number=number)
        table.add(run.alone, Measured(alone_s, 0.0, "m", "v"))
        table.add(run, Measured(run_s, 1e6, "m", "v"))
    assert SlowLinkTable(table.path).rows == table.rows
    page = write_report(table)[0].read_text(encoding="utf-8")
    assert "| ds_pso ZeRO 2 local_sgd n=32 |  | 75.0 (50.0 to 80.0) |  |" in page
    assert "| ds_pso ZeRO 2 local_sgd n=32 |  | 32.00 (32.00 to 32.00) |  |" in page, "megabytes of 32 steps"
    assert "Training loss" not in page, "nothing was recorded"
    assert replace(Run("ds_pso"), talks=False).name == "ds_pso ZeRO 2, alone"


def test_the_loss_is_shown_with_its_steps(tmp_path: Path) -> None:
    table = SlowLinkTable(tmp_path / "slow_link.csv")
    run = Run("DDP", interval=1, wire="fp16")
    for number, loss in enumerate([7.0, 6.5, 6.75]):
        table.add(replace(run, number=number), Measured(1.0, 1e6, "m", "v", loss=loss, steps=9))
    page = write_report(SlowLinkTable(table.path))[0].read_text(encoding="utf-8")
    assert page.split("## Training loss, nats per token")[1].count("| DDP n=1 fp16 |  | 6.750 (9) |  |") == 1
