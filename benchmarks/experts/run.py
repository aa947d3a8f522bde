"""Makes the runs that are missing: trains experts, and searches with every searcher for every target."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from transformers import LlamaForCausalLM

from benchmarks.experts.domains import Domain
from benchmarks.experts.results import Outcome, Results, Run
from benchmarks.experts.settings import ROWS, SEEDS, TARGETS, Row, Size
from benchmarks.experts.train import evaluation_set, make_experts, mean_loss
from benchmarks.table import machine, versions
from ds_pso.search.record import NAME
from ds_pso.search.run import SearchSettings, search_experts


def missing(results: Results, targets: Iterable[str], only: Iterable[str]) -> list[Run]:
    """Return the runs that are not in the table, all of a seed before the next."""
    wanted = [Run(target, row.name, seed) for seed in SEEDS for target in targets for row in ROWS]
    return [run for run in wanted if run not in results.rows and any(text in str(run) for text in only)]


def targets_of(domains: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the targets whose domains are all there."""
    known = tuple(domains)
    found = {name: wanted or known for name, wanted in TARGETS.items()}
    return {name: wanted for name, wanted in found.items() if set(wanted) <= set(known)}


def run_all(
    size: Size, domains: dict[str, Domain], results: Results, folder: Path, only: Iterable[str], deadline: float
) -> None:
    """Run until nothing is missing, or time is up.

    Args:
        folder: for experts and records of searches.
        only: texts of which one has to be in a run.
        deadline: ``time.time()`` after which no run is started.
    """
    rows, targets = {row.name: row for row in ROWS}, targets_of(domains)
    for run in missing(results, targets, only):
        if time.time() > deadline:
            return
        place = folder / f"seed{run.seed}"
        base, experts = make_experts(size, domains, run.seed, place)
        wanted = [domains[name] for name in targets[run.target]]
        results.add(run, _search(size, rows[run.row], run, wanted, base, experts, place))
        print(f"{run}: {results.rows[run].test_loss:.4f}, {results.rows[run].seconds:.0f} s", flush=True)


def _search(
    size: Size, row: Row, run: Run, wanted: list[Domain], base: Path, experts: list[Path], place: Path
) -> Outcome:
    begin = time.perf_counter()
    search = partial(mean_loss, blocks=evaluation_set(wanted, "search", size.search, run.seed))
    test = partial(mean_loss, blocks=evaluation_set(wanted, "test", size.test, run.seed))
    if not row.searcher:
        model = LlamaForCausalLM.from_pretrained(base).eval()
        found, test_loss, by, curve, evaluations = search(model), test(model), "base", "", 1
    else:
        out = place / "searches" / f"{run.target} {row.name}".replace(" ", "_")
        settings = SearchSettings(
            experts,
            out,
            search,
            test,
            base=base if row.base else None,
            searcher=row.searcher,
            options=row.options,
            blocks=row.blocks,
            evaluations=size.evaluations,
            seed=run.seed,
            resume=(out / NAME).exists(),
        )
        result = search_experts(settings)
        assert result.winner.test is not None
        found, test_loss, by = result.winner.score, result.winner.test, result.winner.by
        evaluations = result.evaluations
        improvements = json.loads(result.record.read_text(encoding="utf-8"))["result"]["improvements"]
        curve = " ".join(f"{item['evaluation']}:{item['score']:.4f}" for item in improvements)
    return Outcome(found, test_loss, evaluations, by, curve, time.perf_counter() - begin, machine(), versions())
