"""The comparison of the sync modes: its bookkeeping, and small versions of what its tables show."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pool import Pool
from safetensors.torch import save_file

from benchmarks.convergence.cells import (
    LR_FACTORS,
    SEEDS,
    SITUATIONS,
    SYNCING,
    TABLES,
    TUNING_SEED,
    Cell,
    cells_of,
    tuned_rates,
    tuning_of,
    with_rates,
)
from benchmarks.convergence.data import SEQ_LENGTH, Data
from benchmarks.convergence.grids import Stat, grids_of, steps_to
from benchmarks.convergence.results import Outcome, Results
from benchmarks.convergence.tasks import TASKS

OUTCOME = Outcome(
    loss=0.5,
    accuracy=0.75,
    train_loss=0.25,
    train_accuracy=0.875,
    megabytes=1.5,
    curve="64:0.5 128:0.75",
    seconds=1.0,
    how="simulated",
    machine="a machine, with a comma",
    versions="some",
)
CELL = Cell("mnist", "local_sgd", 4, 32, 128, seed=1, lr=0.02)


# -- which runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_rule_of_a_table_is_run_with_every_seed_and_tuned_on_another(table):
    cells = cells_of(table)
    assert len(set(cells)) == len(cells)
    assert all(cell.steps >= 1 and cell.seed < TUNING_SEED for cell in cells)
    for cell in cells:
        assert {replace(cell, seed=seed) for seed in SEEDS} <= set(cells)
    if table in ("papers", "transformers", "unequal"):
        assert {cell.rule for cell in cells} >= set(SYNCING)
    tuned = {cell.rate_key for cell in tuning_of(cells)}
    assert tuned == {cell.rate_key for cell in cells}
    assert len(tuning_of(cells)) == sum(len(LR_FACTORS) * TASKS[task].tuning_seeds for task, *_ in tuned)
    assert all(cell.split == "validation" and cell.seed >= TUNING_SEED for cell in tuning_of(cells))


def test_rules_are_compared_at_equal_samples():
    samples = {
        cell.task: {c.steps * c.batch for c in cells_of("papers") if c.task == cell.task and not c.eval_every}
        for cell in cells_of("papers")
    }
    assert samples == {"mnist": {TASKS["mnist"].samples}, "cifar10": {TASKS["cifar10"].samples}}


def test_the_unequal_table_has_every_situation():
    assert {cell.situation for cell in cells_of("unequal")} == set(SITUATIONS)


def test_the_best_rate_is_taken_when_all_were_tried():
    cell = replace(CELL, task="cifar10", split="validation")
    runs = [replace(cell, lr=lr, seed=TUNING_SEED) for lr in (0.1, 0.2, 0.3, 0.4, 0.5)]
    scores = dict(zip(runs, [3.0, 1.0, 2.0, math.nan, 1.0], strict=True))
    assert tuned_rates(scores) == {("cifar10", "local_sgd", 32, 128): 0.2}
    assert with_rates([replace(cell, lr=0.0, interval=128)], tuned_rates(scores))[0].lr == 0.2
    assert tuned_rates(dict(list(scores.items())[:4])) == {}
    assert with_rates([cell], {})[0].lr == 0.0


def test_several_tuning_seeds_count_by_their_mean():
    assert TASKS["mnist"].tuning_seeds == 3
    rates, seeds = (0.1, 0.2, 0.3, 0.4, 0.5), range(TUNING_SEED, TUNING_SEED + 3)
    of_rates = [(0.0, 5.0, 5.0), (3.0, 3.0, 3.0), (9.0, 9.0, 9.0), (2.0, 2.0, math.nan), (4.0, 4.0, 0.0)]
    scores = {
        replace(CELL, lr=lr, seed=seed, split="validation"): score
        for lr, of_seeds in zip(rates, of_rates, strict=True)
        for seed, score in zip(seeds, of_seeds, strict=True)
    }
    others = {replace(cell, interval=8): -1.0 for cell in scores}  # of a time when each interval was tuned
    assert list(tuned_rates(others | scores).values()) == [0.5]
    scores.popitem()
    assert tuned_rates(scores) == {}


# -- what is kept ---------------------------------------------------------------------------


def test_rows_survive_and_half_a_row_does_not(tmp_path):
    path = tmp_path / "table.csv"
    cells = [replace(CELL, seed=seed) for seed in range(3)]
    for cell in cells[:2]:
        Results(path).add(cell, OUTCOME)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)  # the machine went down while the second row was written
    assert Results(path).rows == {cells[0]: OUTCOME}
    Results(path).add(cells[2], OUTCOME)
    assert Results(path).rows == {cells[0]: OUTCOME, cells[2]: OUTCOME}


def test_a_file_without_the_newest_columns_gets_them(tmp_path):
    path = tmp_path / "table.csv"
    Results(path).add(CELL, OUTCOME)
    old = [
        line.replace(",fp32,0,1,", ",").replace(",wire,delay,fragments,", ",") for line in path.read_text().splitlines()
    ]
    assert old != path.read_text().splitlines()
    path.write_text("\n".join(old) + "\n")
    assert Results(path).rows == {CELL: OUTCOME}
    other = replace(CELL, wire="int4", delay=3)
    Results(path).add(other, OUTCOME)
    assert Results(path).rows == {CELL: OUTCOME, other: OUTCOME}


def test_statistics():
    assert str(Stat.of([1.0, 2.0, 3.0], ".2f")) == "2.00 +- 1.00"
    assert str(Stat.of([1.0, math.nan], ".2f")) == "1 of 2 diverged"
    assert str(Stat.of([1.0], ".1f")) == "1.0"
    assert steps_to(0.6, OUTCOME.curve) == 128
    assert steps_to(0.8, OUTCOME.curve) == math.inf


def test_differences_are_of_equal_seeds():
    rows = {}
    for seed, (averaging, other) in enumerate([(0.5, 0.6), (0.7, 0.6)]):
        for rule, accuracy in (("local_sgd", averaging), ("pso", other)):
            rows[replace(CELL, rule=rule, seed=seed)] = replace(OUTCOME, accuracy=accuracy)
    (difference,) = (grid for grid in grids_of("unequal", rows) if "difference" in grid.what)
    stat = difference.stats["pso", "clean"]
    assert stat.mean == pytest.approx(0.0)
    assert stat.deviation == pytest.approx(10 * math.sqrt(2))


# -- what comes out: small versions of the tables, beyond the noise --------------------------


def write_images(folder: Path) -> None:
    """Ten blurred patterns under noise, laid out as the benchmark keeps MNIST."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 1, 7, 7, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size=28, mode="bilinear")
    arrays = {}
    for split, size in {"train": 12_000, "test": 1000}.items():
        labels = torch.randint(10, (size,), generator=generator)
        noise = torch.randn(size, 1, 28, 28, generator=generator)
        arrays[f"{split}_images"] = (255 * (patterns[labels] + 1.1 * noise)).clamp(0, 255).to(torch.uint8)
        arrays[f"{split}_labels"] = labels
    save_file(arrays, folder / "mnist.safetensors")


def text() -> Data:
    """A language of 64 words in which each may be followed by four others."""
    generator = torch.Generator().manual_seed(0)
    followers = torch.randint(64, (64, 4), generator=generator)
    blocks = [torch.randint(64, (3000,), generator=generator)]
    for _ in range(SEQ_LENGTH - 1):
        blocks.append(followers[blocks[-1], torch.randint(4, (3000,), generator=generator)])
    tokens = torch.stack(blocks, dim=1)
    return Data(
        train=(tokens[:2500],),
        probe=(tokens[2500:2600],),
        validation=(tokens[2600:2800],),
        test=(tokens[2800:],),
        tokenizer=Words(),
    )


class Words:
    eos_token_id = 0

    def __len__(self) -> int:
        return 64


def run_cells(folder: Path, cells: list[Cell]) -> dict[Cell, Outcome]:
    import ds_pso
    from benchmarks.convergence import data
    from benchmarks.convergence.run import quieten
    from benchmarks.convergence.train import clean_up, config_of, train

    quieten()
    data.CACHE = folder
    data._loaded["python"] = text()
    outcomes = {}
    for cell in cells:
        config = config_of(cell, cell.num_worlds, zero_stage=0)
        outcomes[cell] = ds_pso.simulate(config, lambda swarm, cell=cell: train(swarm, cell))[0]
        clean_up()
    return outcomes


@pytest.mark.slow
def test_small_versions_of_the_tables(pool: Pool, tmp_path: Path) -> None:
    write_images(tmp_path)
    wanted = {
        "averaging": CELL,
        "never": replace(CELL, rule="none", interval=0),
        "every step": replace(CELL, rule="allreduce", interval=0),
        **{f"{rule} high": replace(CELL, rule=rule, situation="high_lr") for rule in ("local_sgd", "swarm")},
        **{f"{rule} nan": replace(CELL, rule=rule, situation="nan") for rule in ("local_sgd", "allreduce")},
        "swarm": replace(CELL, rule="swarm"),
    }
    (outcomes,) = pool.run(run_cells, tmp_path, list(wanted.values()), world_size=1, timeout=150)
    accuracy = {name: outcomes[cell].accuracy for name, cell in wanted.items()}
    print(accuracy)
    assert accuracy["averaging"] > accuracy["never"] + 0.02
    assert accuracy["every step"] > accuracy["never"] + 0.02
    assert accuracy["swarm"] > accuracy["averaging"] - 0.05
    assert accuracy["swarm high"] > accuracy["local_sgd high"] + 0.2
    assert accuracy["local_sgd nan"] > accuracy["averaging"] - 0.05
    assert math.isnan(outcomes[wanted["allreduce nan"]].loss)
    assert outcomes[wanted["averaging"]].megabytes < 0.1 * outcomes[wanted["every step"]].megabytes


@pytest.mark.slow
def test_a_small_version_of_the_transformers(pool: Pool, tmp_path: Path) -> None:
    cell = Cell("gpt_small", "local_sgd", 4, 32, 64, seed=1, lr=0.004)
    rules = {"local_sgd": 32, "allreduce": 0, "easgd": 32, "none": 0}
    cells = {rule: replace(cell, rule=rule, interval=interval) for rule, interval in rules.items()}
    (outcomes,) = pool.run(run_cells, tmp_path, list(cells.values()), world_size=1, timeout=150)
    loss = {rule: outcomes[cell].loss for rule, cell in cells.items()}
    print(loss)
    assert loss["allreduce"] < loss["local_sgd"] - 0.05
    assert loss["local_sgd"] < loss["easgd"] - 0.05
    assert loss["local_sgd"] < loss["none"] - 0.05


@pytest.mark.slow
def test_a_small_version_of_the_optimizer_states(pool: Pool, tmp_path: Path) -> None:
    cell = Cell("gpt_small", "local_sgd", 4, 8, 64, seed=1, lr=0.004)
    cells = {state: replace(cell, optimizer_state=state) for state in ("average", "reset")}
    (outcomes,) = pool.run(run_cells, tmp_path, list(cells.values()), world_size=1, timeout=150)
    loss = {state: outcomes[cell].loss for state, cell in cells.items()}
    print(loss)
    assert loss["average"] < loss["reset"] - 0.03
