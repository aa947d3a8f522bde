"""The pages of the benchmarks are what their scripts draw of the committed rows: none has been left behind, or edited.

That of the levers: test_levers.py. Those of the soak also need what the undisturbed runs were like.
"""

from __future__ import annotations

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
