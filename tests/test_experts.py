"""The benchmark of experts: its domains, which runs are missing, one short run, and the page from its rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experts.__main__ import main
from benchmarks.experts.domains import Domain, load_domains
from benchmarks.experts.report import write_report
from benchmarks.experts.results import FOLDER, Outcome, Results, Run
from benchmarks.experts.run import missing, targets_of
from benchmarks.experts.settings import GREEDY, ROWS, SEEDS, SIZES
from benchmarks.experts.train import evaluation_set
from ds_pso.search.registry import SEARCHERS, make_options
from ds_pso.training.text import Blocks

OUTCOME = Outcome(3.0, 3.0, 320, "particle from expert data", "1:4.0 7:3.0", 1.0, "a machine", "ds_pso 0")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_searcher(row):
    assert not row.searcher or make_options(row.searcher, row.options)
    assert not row.searcher or not SEARCHERS[row.searcher].needs_base or row.base


def test_targets_need_their_domains():
    assert "everything" in targets_of(["network", "data"])
    assert "wikitext2-valid + network" not in targets_of(["network", "data"])
    assert targets_of(["network", "data"])["everything"] == ("network", "data")


def test_what_is_missing(tmp_path):
    results = Results("tiny", tmp_path)
    assert len(missing(results, ["everything"], [""])) == len(ROWS) * len(SEEDS)
    results.add(Run("everything", GREEDY, 1), OUTCOME)
    again = Results("tiny", tmp_path)
    assert Run("everything", GREEDY, 1) not in missing(again, ["everything"], [""])
    assert missing(again, ["everything"], [f"'{GREEDY}', seed=2"]) == [Run("everything", GREEDY, 2)]


def test_sequences_come_in_equal_shares_and_not_twice():
    domains = [Domain({"test": Blocks(np.full(128 * 20, k), 128)}) for k in range(3)]
    blocks = evaluation_set(domains, "test", 10, 1)
    assert torch.bincount(blocks[:, 0]).tolist() == [3, 3, 4]
    counted = [Domain({"test": Blocks(np.arange(128 * 20), 128)})]
    assert len(evaluation_set(counted, "test", 20, 1).unique()) == 128 * 20


def test_the_page_compares_pairs_of_equal_seed(tmp_path):
    results = Results("tiny", tmp_path)
    for seed in SEEDS[:3]:
        results.add(Run("everything", GREEDY, seed), replace(OUTCOME, test_loss=3.0 + seed))
        results.add(Run("everything", "PSO, per layer", seed), replace(OUTCOME, test_loss=2.9 + seed + 0.001 * seed))
    results.add(Run("everything", "base", 1), replace(OUTCOME, curve="", test_loss=5.0))
    page, picture = write_report("tiny", results)
    text = page.read_text()
    assert "| PSO, per layer | 4.902 +- 1.001 |" in text
    assert "| PSO, per layer | **-0.098 +- 0.001** |" in text
    assert "| base | +1.000 |" in text
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("size", [path.stem for path in FOLDER.glob("*.csv")])
def test_the_page_is_that_of_the_rows(tmp_path: Path, size: str) -> None:
    shutil.copy(FOLDER / f"{size}.csv", tmp_path)
    page, _ = write_report(size, Results(size, tmp_path))
    assert page.read_text() == (FOLDER / f"{size}.md").read_text()


@pytest.mark.slow
def test_a_short_run(tmp_path):
    """Trains ten small models; the row of the base has its loss, and every search is no worse than the best expert."""
    command = ["tiny", "--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    only = ["--only", "'network + data', row='base', seed=1", "'network + data', row='PSO, per layer', seed=1"]
    only += ["'network + data', row='best single expert', seed=1", "'network + data', row='greedy soup', seed=1"]
    assert main([*command, *only]) == 0
    rows = {run.row: outcome for run, outcome in Results("tiny", tmp_path / "results").rows.items()}
    assert set(rows) == {"base", "best single expert", GREEDY, "PSO, per layer"}
    assert rows["PSO, per layer"].evaluations == SIZES["tiny"].evaluations
    assert rows["PSO, per layer"].loss <= rows[GREEDY].loss <= rows["best single expert"].loss
    record = json.loads(next(tmp_path.glob("cache/tiny/seed1/searches/*PSO*/search.json")).read_text())
    assert len(record["evaluations"]) == SIZES["tiny"].evaluations
    assert main([*command, *only]) == 0  # nothing is missing


@pytest.mark.slow
def test_domains_differ_and_their_splits_too(tmp_path):
    (tmp_path / "verse.txt").write_text("Shall I compare thee to a summer's day?\n" * 2000)
    domains = load_domains(tmp_path)
    assert list(domains) == ["network", "data", "interface", "docstrings", "copy", "sort", "arithmetic", "verse"]
    for name, domain in domains.items():
        seen = {
            split: {tuple(blocks[i].tolist()) for i in range(len(blocks))} for split, blocks in domain.splits.items()
        }
        assert all(len(blocks) >= 8 for blocks in seen.values()) or name == "verse"
        if name != "verse":
            assert not seen["train"] & seen["test"]
            assert not seen["search"] & seen["test"]
