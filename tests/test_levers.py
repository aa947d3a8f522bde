"""The benchmark of the levers: which runs are missing, one short run, and the page from its rows."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pool import Pool

from benchmarks.levers.report import write_report
from benchmarks.levers.results import FOLDER, Outcome, Results, Run
from benchmarks.levers.search import best_rate, missing, next_rate
from benchmarks.levers.settings import FIRST_RATE, SEEDS, SETTINGS, SIZES, Setting
from benchmarks.levers.train import config_of, simulate
from ds_pso.config.load import load_config

SETTING = Setting("fp32, n = 32", "AdamW", {"sync_mode": "local_sgd", "sync_interval": 32})
OUTCOME = Outcome(3.0, 3.0, 80.0, 1000, 1.0, "a machine", "ds_pso 0")


def rows(losses: dict[float, float], seed: int = SEEDS[0]) -> dict[Run, Outcome]:
    return {Run(str(SETTING), lr, seed): replace(OUTCOME, validation_loss=loss) for lr, loss in losses.items()}


@pytest.mark.parametrize(
    ("losses", "best", "following"),
    [
        ({}, None, 0.008),
        ({0.004: 3.0}, None, 0.008),
        ({0.004: 3.0, 0.008: 3.1}, None, 0.002),
        ({0.004: 3.0, 0.008: 2.9}, None, 0.016),
        ({0.004: 3.0, 0.008: 2.9, 0.016: math.nan}, 0.008, None),
        ({0.002: 3.1, 0.004: 3.0, 0.008: 3.1}, 0.004, None),
        ({0.001: 3.1, 0.004: 3.0, 0.008: 3.1}, None, 0.002),  # what is farther than a factor says nothing
        ({0.002: 3.0, 0.004: 3.1}, None, 0.001),
    ],
)
def test_a_rate_is_the_best_when_its_neighbours_are_worse(losses, best, following):
    assert best_rate(SETTING, rows(losses)) == best
    assert next_rate(SETTING, rows(losses)) == following


def test_other_seeds_wait_for_the_rate():
    other = replace(SETTING, name="other")
    found = rows({0.002: 3.1, 0.004: 3.0, 0.008: 3.1})
    assert missing([SETTING, other], found, seeds=3) == [
        Run(str(other), FIRST_RATE["AdamW"], SEEDS[0]),
        *(Run(str(SETTING), 0.004, seed) for seed in SEEDS[1:]),
    ]
    assert missing([SETTING], found | rows({0.004: 2.0}, SEEDS[1]), seeds=2) == []


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_setting_is_a_config(setting):
    load_config(config_of(SIZES["small"], setting, 0.01))


def run_shortly(names: list[str]) -> list[Outcome]:
    size = replace(SIZES["small"], model="llama:1x32", steps=40, batch=1)
    settings = {str(setting): setting for setting in SETTINGS}
    return [simulate(size, settings[name], Run(name, 0.01, 1)) for name in names]


@pytest.mark.slow
def test_short_runs_of_a_few_settings(pool: Pool) -> None:
    names = ["Muon: every step", "Muon: sparse 1/64, n = 1, residual in weights", "AdamW: int4, n = 4"]
    environment = {"TORCH_COMPILE_DISABLE": "1"}
    (found,) = pool.run(run_shortly, names, world_size=1, env=environment, timeout=300)
    every_step, sparse, int4 = found
    for outcome in found:
        assert 3 < outcome.loss < math.log(1024)
    assert every_step.megabytes == pytest.approx(40 * 1.5 * 4 * every_step.parameters / 1e6)
    assert 60 < every_step.megabytes / sparse.megabytes < 72
    assert 25 < every_step.megabytes / int4.megabytes < 31


@pytest.mark.parametrize("size", [path.stem for path in FOLDER.glob("*.csv")])
def test_the_page_is_that_of_the_rows(tmp_path: Path, size: str) -> None:
    shutil.copy(FOLDER / f"{size}.csv", tmp_path)
    page, picture = write_report(size, Results(size, tmp_path))
    assert page.read_text() == (FOLDER / f"{size}.md").read_text()
    assert picture.stat().st_size > 10_000
