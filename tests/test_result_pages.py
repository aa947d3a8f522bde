"""The pages of the benchmarks are what their scripts draw of the committed rows: none has been left behind, or edited.

That of the levers: test_levers.py. Those of the soak also need what the undisturbed runs were like.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import benchmarks.convergence.__main__ as convergence
import benchmarks.memory.__main__ as memory
import benchmarks.sync_cost.__main__ as sync_cost
from benchmarks.convergence import results
from benchmarks.slow_link import report as slow_link
from benchmarks.slow_link.results import FOLDER as SLOW_LINK
from benchmarks.slow_link.results import SlowLinkTable
from benchmarks.table import Table
from ds_pso.cli.main import main as ds_pso_command
from ds_pso.rules import RULES

MEASURED: list[tuple[Path, Callable[[Path], object]]] = [
    (memory.FOLDER / "memory", lambda csv: memory.write_report(Table(csv, memory.Key, memory.Measured))),
    (sync_cost.FOLDER / "sync_cost", lambda csv: sync_cost.write_report(Table(csv, sync_cost.Case, sync_cost.Cost))),
    (SLOW_LINK / "slow_link", lambda csv: slow_link.write_report(SlowLinkTable(csv))),
]


@pytest.mark.parametrize(("stem", "draw"), MEASURED, ids=[stem.name for stem, _ in MEASURED])
def test_measurements(tmp_path: Path, stem: Path, draw: Callable[[Path], object]) -> None:
    draw(Path(shutil.copy(stem.with_suffix(".csv"), tmp_path)))
    assert (tmp_path / stem.with_suffix(".md").name).read_text() == stem.with_suffix(".md").read_text()


@pytest.mark.parametrize("table", sorted(path.stem for path in results.FOLDER.glob("*.md")))
def test_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    folder = results.FOLDER
    for path in folder.glob("*.csv"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert convergence.main([table, "--report"]) == 0
    assert (tmp_path / f"{table}.md").read_text() == (folder / f"{table}.md").read_text()


# -- what is told of them -------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SYNC_MODES = (ROOT / "docs/sync-modes.md").read_text(encoding="utf-8")


def rows_below(text: str, heading: str) -> dict[str, list[str]]:
    """Return the first table below a heading: its cells by the first one, that of the column names being empty."""
    lines = text.split(heading, 1)[1].splitlines()
    table = list(
        itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda s: s[:1] != "|", lines))
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0].replace("`", ""): row[1:] for row in cells if not row[0].startswith("---")}


def agree(told: list[str], found: list[str]) -> bool:
    """True if the numbers of the first list are those of the second, which has one more digit, rounded."""
    return len(told) == len(found) and all(map(_agree, told, found))


def _agree(told: str, found: str) -> bool:
    number = re.compile(r"\d+\.\d+")
    if number.sub("", told) != number.sub("", found):
        return False
    pairs = zip(number.findall(told), number.findall(found), strict=True)
    # Of a number that was rounded already, half a unit of its own last digit is not known either.
    return all(abs(float(a) - float(b)) <= 0.5 * (unit(a) + unit(b)) + 1e-9 for a, b in pairs)


def unit(number: str) -> float:
    return 10.0 ** -len(number.split(".")[1])


def page_of(table: str) -> str:
    return (results.FOLDER / f"{table}.md").read_text(encoding="utf-8")


def test_unhealthy_particles() -> None:
    told = rows_below(SYNC_MODES, "results/fairness.md)")
    found = rows_below(page_of("fairness"), "## mnist, 1 times the tuned rate of local_sgd")
    columns = [found[""].index(name) for name in ("clean", "high_lr", "shuffled_labels", "all_low")]
    for rule in ("local_sgd", "swarm"):
        assert agree(told[rule], [found[rule][column] for column in columns]), rule
    assert set(told) == {"", "local_sgd", "swarm"}


def test_a_small_llama() -> None:
    told = rows_below(SYNC_MODES, "A small Llama on source code")
    slow, rules = (rows_below(page_of(table), "## gpt_small") for table in ("slow_network", "transformers"))
    every, n4, n8, n32 = (slow[""].index(name) for name in ("no n", "n = 4", "n = 8", "n = 32"))
    fp32, int4 = slow["fp32, d = 0"], slow["int4, d = 0"]
    assert agree(told["allreduce"], [slow["allreduce"][every], "", "", ""])
    assert agree(told["local_sgd"], ["", fp32[n4], fp32[n8], fp32[n32]])
    assert agree(told['local_sgd, "wire": "int4"'], ["", int4[n4], "", int4[n32]])
    others = {name: cells for name, cells in rules.items() if name in RULES and name != "local_sgd"}
    best = []
    for column in (rules[""].index("n = 8"), rules[""].index("n = 32")):
        name = min(others, key=lambda rule: others[rule][column])
        best.append(f"{others[name][column]} ({name})")
    assert agree([cell.replace("`", "") for cell in told["best of the other modes"]], ["", "", *best])


TOLD = {  # in the README's first table -> as the tables call it, and after how many steps it syncs
    "DeepSpeed ZeRO 2, every step": ("DeepSpeed ZeRO 2 n=1", 1, "allreduce", "no n"),
    "torchft DiLoCo, every 32 steps, delay 8": ("torchft diloco n=32 d=8", 32, None, None),
    "ds_pso ZeRO 2, every 8 steps, int4, delay 2": ("ds_pso ZeRO 2 local_sgd n=8 int4 d=2", 8, "int4, d = 2", "n = 8"),
    "ds_pso ZeRO 0, every 8 steps, int4, delay 2": ("ds_pso ZeRO 0 local_sgd n=8 int4 d=2", 8, "int4, d = 2", "n = 8"),
}


def test_the_first_table_of_the_readme() -> None:
    """Speed and price of the same setting: interval, wire and delay."""
    told = rows_below(README, "results/gain.png)")
    page = SLOW_LINK.joinpath("slow_link.md").read_text(encoding="utf-8")
    speed, share, received = (rows_below(page, f"## {title}") for title in ("Tokens per", "Compute share", "Received"))
    losses = rows_below(page_of("slow_network"), "## gpt_small")
    assert set(told) == {"over 100 Mbit/s", *TOLD}
    for label, (name, interval, loss_row, column) in TOLD.items():
        at = speed[""].index("100 Mbit/s")
        tokens, compute, megabytes = (table[name][at].split()[0] for table in (speed, share, received))
        loss = "not measured"
        if loss_row is not None:
            loss = f"{float(losses[loss_row][losses[''].index(column)].split()[0]):.2f}"
        expected = [f"{int(tokens):,}", f"{float(megabytes) / interval:.2g}", f"{compute} %", loss]
        if float(megabytes) / interval > 10:
            expected[1] = f"{float(megabytes) / interval:.1f}"
        assert told[label] == expected, label


def test_what_the_readme_says_of_links(capsys: pytest.CaptureFixture[str]) -> None:
    told = rows_below(README, "## Which link needs what")
    links = [link for link in told if link.endswith("bit/s")]
    assert len(links) == 4
    for link in links:
        command = ["plan", "--parameters", "1B", "--step-seconds", "1", "--particles", "4", "--bandwidth", link]
        assert ds_pso_command([word.replace(" ", "") for word in command]) == 0
        rows = {row[0].strip(): row for row in map(re.compile(r"\s{2,}").split, capsys.readouterr().out.splitlines())}
        zero, int4, sparse = (
            rows[name]
            for name in ("ZeRO 2, every step, 16-bit gradients", "local_sgd, n = 8, int4", "local_sgd, n = 1, sparse")
        )
        assert told[link] == [zero[1], int4[3].replace(",", ""), sparse[3].replace(",", "")], link
