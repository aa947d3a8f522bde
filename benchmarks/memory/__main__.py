"""``python -m benchmarks.memory``: what memory each mode takes, and whether it is what
``ds_pso.config.cost_model`` says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.memory.worker import INTERVAL, MARK, WIDTH
from benchmarks.slow_link.stacks import build_model
from benchmarks.table import Table, machine, versions
from ds_pso.config.cost_model import Cluster, Memory, memory
from ds_pso.config.load import load_config
from ds_pso.utils.atomic_io import write_atomically

FOLDER = Path(__file__).parent / "results"
CLAIMS = Path(__file__).parent / "claims.md"
LIMIT_S = 300
# A bucket is never smaller than the shard; and two ranks may share a GPU.
_EVERY = {"particles": 2, "sync_interval": INTERVAL, "bucket_mb": 4096, "peer_backend": "gloo"}
_LATE = {"delay": 2}
_STREAMING = {"delay": 1, "fragments": 2, "streaming": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSpeed": ("DeepSpeed", {}),
    "ds_pso local_sgd": ("ds_pso", {}),
    "ds_pso local_sgd, bucket_mb 16": ("ds_pso", {"bucket_mb": 16}),
    "ds_pso pso": ("ds_pso", {"sync_mode": "pso"}),
    "ds_pso pso, inertia": ("ds_pso", {"sync_mode": "pso", "pso": {"inertia": 0.5}}),
    "ds_pso easgd": ("ds_pso", {"sync_mode": "easgd"}),
    "ds_pso diloco": ("ds_pso", {"sync_mode": "diloco"}),
    "ds_pso diloco, state in bf16": ("ds_pso", {"sync_mode": "diloco", "state_dtype": "bf16"}),
    "ds_pso local_sgd, bf16": ("ds_pso", {"wire": "bf16"}),
    "ds_pso local_sgd, int4": ("ds_pso", {"wire": "int4"}),
    "ds_pso local_sgd, int4, state in bf16": ("ds_pso", {"wire": "int4", "state_dtype": "bf16"}),
    "ds_pso pso, int4": ("ds_pso", {"sync_mode": "pso", "wire": "int4"}),
    "ds_pso local_sgd, delay": ("ds_pso", _LATE),
    "ds_pso local_sgd, delay, int4": ("ds_pso", _LATE | {"wire": "int4"}),
    "ds_pso local_sgd, streaming": ("ds_pso", _STREAMING),
    "ds_pso diloco, streaming, int4, state in bf16": (
        "ds_pso",
        _STREAMING | {"sync_mode": "diloco", "wire": "int4", "state_dtype": "bf16"},
    ),
    "torchft alone": ("torchft", {"sync_mode": "local_sgd", "sync_interval": 10**6}),
    "torchft local_sgd": ("torchft", {"sync_mode": "local_sgd"}),
    "torchft diloco": ("torchft", {"sync_mode": "diloco"}),
}


@dataclass(frozen=True)
class Key:
    case: str
    number: int  # of the repetition


@dataclass(frozen=True)
class Measured:
    """Bytes, of the rank that took more."""

    steady: int  # between two sync points
    peak: int  # of steps and sync points
    sync: int  # of a sync point beyond what was there before it; 0 if not known
    machine: str
    versions: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--report", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    table = Table(FOLDER / "memory.csv", Key, Measured)
    wanted = [] if arguments.report else [Key(case, number) for number in range(arguments.runs) for case in CASES]
    if importlib.util.find_spec("torchft") is None:
        print("memory: without torchft; to compare with it: pip install torchft==0.2.0", file=sys.stderr)
        wanted = [key for key in wanted if "torchft" not in key.case]
    for key in wanted:
        if key not in table.rows:
            table.add(key, measure(*CASES[key.case]))
            print(f"{key.case}, run {key.number}: {table.rows[key].peak / 1e6:.0f} MB", flush=True)
    print(write_report(table))
    return 0


def section_of(keys: dict[str, Any]) -> dict[str, Any]:
    return _EVERY | keys


def measure(stack: str, keys: dict[str, Any]) -> Measured:
    """Two ranks of this machine, each a particle."""
    command = [sys.executable, "-m", "benchmarks.memory.worker", json.dumps([stack, section_of(keys)])]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        ranks = []
        for rank, log in enumerate(logs):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
                "ADDRESS": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once
            }
            with log.open("wb") as output:
                ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        try:
            for process in ranks:
                process.wait(LIMIT_S)
        finally:
            for process in ranks:
                process.kill()
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    found = [json.loads(line.split(MARK)[1]) for text in texts for line in text.splitlines() if MARK in line]
    if len(found) < 2:
        raise RuntimeError("no result:\n" + "\n".join(text[-2000:] for text in texts))
    most = {name: max(rank[name] for rank in found) for name in ("steady", "peak", "sync")}
    return Measured(**most, machine=machine(), versions=versions())


def expected(case: str, parameters: int) -> Memory | None:
    """What ``ds_pso.config.cost_model`` says; None for other stacks."""
    stack, keys = CASES[case]
    if stack != "ds_pso":
        return None
    return memory(Cluster(parameters, 2, 1, 1.0, 1e9), load_config({"swarm": section_of(keys)})[1])


def write_report(table: Table[Key, Measured]) -> Path:
    parameters = sum(p.numel() for p in build_model(WIDTH).parameters())
    some, count = next(iter(table.rows.values())), len({key.number for key in table.rows})
    lines = [
        "# memory",
        "",
        f"Made by `python -m benchmarks.memory` on {some.machine} with {some.versions}; medians of "
        f"{count} run{'s' if count > 1 else ''}, of the rank that took more.",
        "",
        f"A Llama of {parameters / 1e6:.1f} million parameters ({4 * parameters / 1e6:.0f} MB in fp32), AdamW, P = 2, "
        "S = 1, ZeRO 2, so few tokens that activations do not count, and a bucket as large as the shard unless the row "
        "says otherwise. MB (10^6 bytes), resident on a CPU and allocated on a GPU. *kept*: between sync points, "
        "beyond the same stack alone. *sync*: the most during a sync point beyond what was there before it "
        "(on a GPU without the buckets, which gloo needs on the host). "
        "*formula*: `ds_pso.config.cost_model.memory`. *peak*: of the whole process.",
        "",
        "| | kept | formula | sync | formula | peak | beyond the stack alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        rows = [row for key, row in table.rows.items() if key.case == case]
        alone = [row for key, row in table.rows.items() if key.case == _alone(case)]
        if not rows or not alone:
            continue
        kept = median(row.steady for row in rows) - median(row.steady for row in alone)
        peak = median(row.peak for row in rows)
        formula = expected(case, parameters)
        cells = [case, _mb(kept) if case != _alone(case) else "", "", "", "", _mb(peak)]
        if formula is not None:
            sync = median(row.sync for row in rows)
            cells[2:5] = _mb(formula.kept), _mb(sync), _mb(formula.pending + formula.exchange)
        cells.append("" if case == _alone(case) else _mb(peak - median(row.peak for row in alone)))
        lines.append(f"| {' | '.join(cells)} |")
    if CLAIMS.exists():
        lines += ["", *CLAIMS.read_text(encoding="utf-8").splitlines()]
    page = table.path.with_suffix(".md")
    write_atomically(page, "\n".join(lines) + "\n")
    return page


def _alone(case: str) -> str:
    return "torchft alone" if "torchft" in case else "DeepSpeed"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main())
