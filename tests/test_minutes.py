"""The benchmark of loss over minutes: training by the clock, the runs of each row, and the page from rows."""

from __future__ import annotations

import math
import shutil
import socket
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import Pool
from torch import Tensor, nn

from benchmarks.levers.settings import FIRST_RATE
from benchmarks.minutes import __main__ as command
from benchmarks.minutes import run as running
from benchmarks.minutes.clock import DECAY, WARMUP, SharedClock, rate_factor
from benchmarks.minutes.report import minutes_to, parse_curve, write_report
from benchmarks.minutes.results import FOLDER, Outcome, Results, Run
from benchmarks.minutes.run import Plan, mean_weights, missing, train_and_score, train_ends, weights_of
from benchmarks.minutes.settings import ALONE, BANDWIDTHS, BY_NAME, MODEL, ROWS, VOCABULARY, Row
from benchmarks.minutes.text import batches, prepare_text
from benchmarks.minutes.worker import train
from benchmarks.slow_link.network import Link, loopback, slow_link, why_not
from benchmarks.slow_link.stacks import Stack
from ds_pso.training.text import Blocks

PLAN = Plan(minutes=15.0, search_minutes=2.0, seeds=1, model=MODEL)
OUTCOME = Outcome(4.0, 4.0, "7.5:5.0 15.0:4.0", 900, 0.5, 2000.0, 1e6, 1_000_000, "a machine", "ds_pso 0")
INT4 = BY_NAME["ds_pso int4, n = 4, d = 1"]


# The schedule by the clock


def test_the_rate_goes_up_is_held_and_goes_down() -> None:
    times = [0.0, WARMUP / 2, WARMUP, 0.5, 1 - DECAY, 1 - DECAY / 2, 1.0, 1.1]
    assert [rate_factor(elapsed) for elapsed in times] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])


@given(st.floats(0, 2), st.floats(0, 2))
def test_the_rate_never_jumps(first: float, second: float) -> None:
    assert 0 <= rate_factor(first) <= 1
    assert abs(rate_factor(first) - rate_factor(second)) <= abs(first - second) / WARMUP + 1e-9


def test_a_step_has_one_time_for_all_ends(tmp_path: Path) -> None:
    """Ends at different speeds: for each step the same time, that of the first; time begins when all are ready."""
    begin = time.monotonic()

    def end(late_s: float, pause_s: float) -> tuple[float, list[float]]:
        clock = SharedClock(tmp_path / "clock", 2)
        time.sleep(late_s)
        clock.start()
        started = time.monotonic() - begin
        times = []
        for step in range(20):
            times.append(clock.elapsed(step))
            time.sleep(pause_s)
        clock.finish()
        return started, times

    with ThreadPoolExecutor(2) as threads:
        (started, fast), (_, slow) = (f.result() for f in [threads.submit(end, 0, 0), threads.submit(end, 2.0, 0.005)])
    assert started >= 2
    assert fast == slow
    assert fast == sorted(fast)
    assert 0 <= fast[0] < fast[-1] < 1.9, "the first to come decides, and the wait for the start does not count"


def test_who_does_not_come_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.minutes.clock._TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match="1 of 2 ends"):
        SharedClock(tmp_path / "clock", 2).start()


class Ticking:
    """A clock on which every step takes a second."""

    def elapsed(self, step: int) -> float:
        return float(step)


def test_training_follows_the_clock() -> None:
    """Rates of each group by the time, snapshots at their times, and an end."""
    module = nn.Linear(1, 1, bias=False)
    groups = [{"lr": 1.0}, {"lr": 1.0}]
    seen = []

    def step(ids: Tensor) -> Tensor:
        seen.append((groups[0]["lr"], groups[1]["lr"]))
        module.weight.data.fill_(len(seen))
        return torch.zeros(())

    data = iter(lambda: torch.zeros(1), None)
    snapshots, steps = train(Stack(step, module, groups), Ticking(), [0.4, 0.04], 100.0, 4, data)
    assert steps == 100
    assert seen == [(0.4 * rate_factor(t / 100), 0.04 * rate_factor(t / 100)) for t in range(100)]
    assert [snapshot.seconds for snapshot in snapshots] == [25, 50, 75, 100]
    assert [float(snapshot.weights["weight"]) for snapshot in snapshots] == [25, 50, 75, 100]


# The data, and what is scored


def test_both_ends_see_each_block_once_in_an_epoch() -> None:
    blocks = Blocks(torch.arange(128 * 40).numpy(), 128)
    ends = [batches(blocks, 4, 7, rank, 2) for rank in range(2)]
    for _ in range(2):
        seen = [int(row[0]) // 128 for end in ends for _ in range(5) for row in next(end)]
        assert sorted(seen) == list(range(40))


def test_the_mean_of_the_weights() -> None:
    found = mean_weights([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}])
    assert found["a"].tolist() == [2.0, 4.0]


# Which runs are missing


def searched(row: Row, bandwidth: str, losses: dict[float, float]) -> dict[Run, Outcome]:
    return {
        Run(row.name, bandwidth, PLAN.search_minutes, lr, 0, True, MODEL): replace(OUTCOME, validation_loss=loss)
        for lr, loss in losses.items()
    }


def test_a_row_is_run_when_its_rate_is_known() -> None:
    fast, slow = BANDWIDTHS
    first = FIRST_RATE["AdamW"]
    rows = searched(INT4, fast, {first: 4.0})
    assert [(run.bandwidth, run.lr, run.search) for run in missing([INT4], rows, PLAN)] == [
        (fast, 2 * first, True),
        (slow, first, True),
    ]
    rows |= searched(INT4, fast, {2 * first: 4.1, first / 2: math.nan})
    final = Run(INT4.name, fast, 15.0, first, 1, False, MODEL)
    assert next(missing([INT4], rows, PLAN)) == final
    assert [run.search for run in missing([INT4], rows | {final: OUTCOME}, PLAN)] == [True]
    assert next(missing([INT4], rows | {final: OUTCOME}, replace(PLAN, seeds=2))).seed == 2
    equal = replace(PLAN, minutes=PLAN.search_minutes)
    lucky = replace(final, minutes=equal.minutes, seed=2, lr=2 * first)
    assert next(missing([INT4], rows | {lucky: replace(OUTCOME, validation_loss=1.0)}, equal)).lr == first
    other = replace(PLAN, search_minutes=3.0)
    assert next(missing([INT4], rows, other)).lr == first, "rates of other times say nothing"


def test_a_machine_alone_needs_no_link() -> None:
    assert [run.bandwidth for run in missing([BY_NAME[ALONE]], {}, PLAN)] == [""]
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_command_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search of three rates and a run, each added when it ends; a row that fails is left, and the rest is run."""

    def carry_out(run: Run) -> Outcome:
        if run.row.startswith(ALONE):
            raise RuntimeError("no result")
        return replace(OUTCOME, validation_loss=abs(math.log(run.lr / 0.008)))

    monkeypatch.setattr(command, "why_not", lambda: None)
    monkeypatch.setattr(command, "prepare_text", lambda: None)
    monkeypatch.setattr(command, "carry_out", carry_out)
    words = ["--folder", str(tmp_path), "--only", ALONE, INT4.name]
    assert command.main(words) == 1
    assert "no result" in capsys.readouterr().err
    runs = list(Results(tmp_path).rows)
    assert [run.lr for run in runs if run.bandwidth == "100 Mbit/s"] == [0.008, 0.016, 0.004, 0.008]
    assert [run.search for run in runs] == [True, True, True, False] * 2
    monkeypatch.setattr(command, "carry_out", lambda run: pytest.fail(f"{run} was run before"))
    assert command.main([*words[:2], "--only", INT4.name]) == 0


# The page


def test_the_time_of_a_loss_lies_between_snapshots() -> None:
    curve = parse_curve("1.0:5.0 2.0:4.0 3.0:3.0")
    assert minutes_to(curve, 4.0) == 2.0
    assert minutes_to(curve, 3.25) == 2.75
    assert minutes_to(curve, 6.0) == 1.0, "before the first one nothing is known"
    assert minutes_to(curve, 2.9) is None


def final(row: str, bandwidth: str, **found: object) -> tuple[Run, Outcome]:
    return Run(row, bandwidth, 15.0, 0.004, 1, False, MODEL), replace(OUTCOME, **found)


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for run, outcome in [
        *searched(INT4, "20 Mbit/s", {0.002: 4.5, 0.004: 4.25, 0.008: math.nan}).items(),
        final(ALONE, "", curve="7.5:5.0 15.0:4.0", step_s=0.2, tokens_per_s=5000.0, bytes_per_step=0.0),
        final(INT4.name, "20 Mbit/s", loss=3.0, curve="7.5:4.5 15.0:3.0", tokens_per_s=9000.0, bytes_per_step=125e3),
        final(
            "DDP, fp16 hook", "20 Mbit/s", loss=4.4, curve="7.5:6.0 15.0:4.4", tokens_per_s=900.0, bytes_per_step=2e6
        ),
        (Run(INT4.name, "100 Mbit/s", 1.0, 0.004, 1, False, MODEL), OUTCOME),  # of other minutes
    ]:
        results.add(run, outcome)
    page, picture = write_report(Results(tmp_path), PLAN)
    text = page.read_text(encoding="utf-8")
    assert "6 runs, those that find learning rates included" in " ".join(text.split())
    assert "r = 8 (1.60 s on the wire, 0.200 s of computing)" in text, "4 bytes x 1e6 x 8 over 20 Mbit/s"
    assert f"| {ALONE} | 0.004 | 4.000 | 15.0 | 1.00 | 5,000 | 0.000 |  |" in text
    assert "| ds_pso int4, n = 4, d = 1 | 0.004 | 3.000 | 10.0 | 1.50 | 9,000 | 0.125 | 0.25 |" in text
    assert "| DDP, fp16 hook | 0.004 | 4.400 | never |  | 900 | 2.000 | 4 |" in text
    assert "| ds_pso int4, n = 4, d = 1 | 20 Mbit/s | 0.002: 4.500, 0.004: 4.250, 0.008: inf |" in text
    assert "## 100 Mbit/s" not in text
    assert picture.stat().st_size > 10_000


def test_no_rows_no_page(tmp_path: Path) -> None:
    assert write_report(Results(tmp_path), PLAN) == []


@pytest.mark.parametrize("folder", [path.parent for path in FOLDER.glob("*.csv")])
def test_the_committed_page_is_that_of_the_rows(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "minutes.csv", tmp_path)
    page, _ = write_report(Results(tmp_path), PLAN)
    assert page.read_text() == (folder / "minutes.md").read_text()


# Short runs


@contextmanager
def some_link() -> Iterator[Link]:
    """A link of 100 Mbit/s; where there can be no namespaces, this machine itself."""
    if why_not() is None:
        with slow_link(1e8) as link:
            yield link
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = min(server.getsockname()[1], 60_000)
    yield loopback(port)


def prepare(dataset: str, folder: Path) -> None:
    prepare_text(dataset, folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """Some modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "sources").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        shutil.copy(path, folder / "sources")
    pool.run(prepare, str(folder / "sources"), folder / "tokens", world_size=1, timeout=120)
    return folder / "tokens"


TORCHFT = "torchft DiLoCo, n = 8, d = 1, 4 fragments"


ONE_OF_EACH_STACK = [
    ALONE,
    "DDP, PowerSGD rank 4",
    "DeepSpeed ZeRO 1, accumulation 8",
    TORCHFT,
    INT4.name,
    "ds_pso Muon, sparse, n = 1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_STACK)
def test_every_stack_trains(name: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("torchft"):
        pytest.importorskip("torchft")
    row = BY_NAME[name]
    monkeypatch.setattr(running, "SNAPSHOTS", 2)
    run = Run(name, row.bandwidths[0], 0.2, 0.01, 1, False, "llama:4x64")
    with some_link() as link:
        outcome = train_and_score(run, link, text)
    curve = parse_curve(outcome.curve)
    assert outcome.loss < math.log(VOCABULARY), "less than that of no training"
    assert [minutes for minutes, _ in curve] == pytest.approx([0.1, 0.2], rel=0.5)
    assert curve[-1][1] == pytest.approx(outcome.loss, abs=1e-4)
    ends = 2 if row.stack.talks else 1
    assert outcome.tokens_per_s == pytest.approx(ends * 8 * 128 / outcome.step_s)
    if why_not() is None:
        whole = 4 * outcome.parameters
        # At the start everything is sent once in ds_pso; PowerSGD's first ten steps are whole.
        assert (outcome.bytes_per_step < 2.5 * whole) if row.stack.talks else outcome.bytes_per_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDP, PowerSGD rank 4", "DeepSpeed ZeRO 1, bf16 gradients, Muon"])
def test_both_ends_of_synchronous_training_hold_the_same_weights(name: str, text: Path, tmp_path: Path) -> None:
    """So they had the same rate at each step, and took as many."""
    run = Run(name, "100 Mbit/s", 0.1, 0.01, 1, True, "llama:4x64")
    with some_link() as link:
        found = train_ends(run, link, tmp_path, text)
    assert found[0]["steps"] == found[1]["steps"] > 10
    first, second = (weights_of(tmp_path, end, 0) for end in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
