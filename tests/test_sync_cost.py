"""The benchmark of a sync point's cost runs every case it has, and measures it against as many bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from comm.test_exchange import make_worlds

from benchmarks.sync_cost.__main__ import Case, Cost, _cases, _copies, measure, write_report
from benchmarks.table import Table
from ds_pso.comm.exchange import Exchange

CASES = _cases([4096.0], 2, "cpu")


def test_every_case(tmp_path: Path) -> None:
    exchanges = [Exchange(world, bucket_mb=1) for world in make_worlds(2)]
    table = Table(tmp_path / "sync_cost.csv", Case, Cost)
    with ThreadPoolExecutor(2) as threads:
        for case in CASES:
            first, second = threads.map(lambda exchange, case=case: measure(case, exchange, 2), exchanges)
            times = first.pass_s, first.bare_s, first.collectives_s, first.rest_s
            assert min(times) > 0, case
            assert times == (second.pass_s, second.bare_s, second.collectives_s, second.rest_s), "the slowest rank's"
            table.add(case, first)
    page = write_report(table).read_text(encoding="utf-8")
    assert sum(line.startswith("| `") for line in page.splitlines()) == len(CASES)


@pytest.mark.parametrize(("rule", "tensors"), [("local_sgd", 5), ("easgd", 7), ("diloco", 9), ("pso", 5)])
def test_a_memory_pass_moves_what_the_rule_must(rule: str, tensors: int) -> None:
    """Read: x to send it, what came, x, the state; written: the bucket, x, the state."""
    x = torch.zeros(1000)
    copies = _copies(Case(rule, "fp32", 1000, 2, "cpu"), x, x.device)
    assert sum(target.numel() + source.numel() for target, source in copies) == tensors * 1000
