"""The memory benchmark: what it measures with, and what its page says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.memory.__main__ import CASES, Key, Measured, expected, write_report
from benchmarks.memory.worker import forget_peak, now, peak
from benchmarks.table import Table
from ds_pso.config.cost_model import Memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_seen_after_it_is_over() -> None:
    before = now()
    forget_peak()
    torch.ones(16 * 2**20).sum()  # 64 MiB
    assert now() < before + 32 * 2**20
    assert peak() > before + 60 * 2**20
    forget_peak()
    assert peak() < before + 32 * 2**20


def test_every_case_has_a_formula_or_is_not_ours() -> None:
    for case, (stack, _) in CASES.items():
        assert (expected(case, 1000) is None) == (stack != "ds_pso"), case
    assert expected("ds_pso diloco", 1000) == Memory(kept=8000, pending=0, exchange=4000)
    streaming = expected("ds_pso local_sgd, streaming", 1000)
    assert streaming == Memory(kept=0, pending=2000, exchange=2000)


def test_the_page_compares_with_the_stack_alone(tmp_path: Path) -> None:
    table = Table(tmp_path / "memory.csv", Key, Measured)
    for number in range(3):
        noise = (number - 1) * 10**6
        table.add(Key("DeepSpeed", number), Measured(10**9, 2 * 10**9 + noise, 0, "m", "v"))
        table.add(Key("ds_pso easgd", number), Measured(1_200_000_000 + noise, 2_500_000_000, 300_000_000, "m", "v"))
    page = write_report(table).read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if "easgd" in line)
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["200", "166", "300", "166", "2500", "500"]
    assert not any(line.startswith("| torchft") for line in page.splitlines())
