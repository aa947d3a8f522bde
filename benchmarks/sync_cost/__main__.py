"""``torchrun --nproc_per_node 2 -m benchmarks.sync_cost``: what a sync point takes beyond the bare collective.

No DeepSpeed and no model: each rank is a particle with one shard of so many elements. ``--device cuda`` keeps the
shards of all particles on one GPU, and exchanges them with gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.table import Table, machine, versions
from ds_pso.comm.compression import FORMATS, Differences, find_format
from ds_pso.comm.exchange import Exchange
from ds_pso.distributed.static_world import carve
from ds_pso.rules import RULES, Rule, SyncPoint
from ds_pso.sync.update import Updater
from ds_pso.utils.atomic_io import write_atomically

FOLDER = Path(__file__).parent / "results"
CLAIMS = Path(__file__).parent / "claims.md"
MODES = ("local_sgd", "diloco", "easgd", "nosync", "pso", "swarm")  # line_search does what diloco does, and scores
OPTIONS: dict[str, dict[str, Any]] = {
    "nosync": {"growth": "constant"},
    "swarm": {"guard": False, "lr_spread": 1.0},  # the guard scores, and sometimes averages twice
}


@dataclass(frozen=True)
class Case:
    rule: str
    wire: str
    numel: int  # of the shard
    particles: int
    device: str


@dataclass(frozen=True)
class Cost:
    """Seconds; of the slowest rank, medians over the runs."""

    pass_s: float  # to copy as many bytes as the rule must read and write
    bare_s: float  # one bare collective of the same bytes
    collectives_s: float  # inside collectives
    rest_s: float  # everything else: filling buckets, rounding, updating
    runs: int
    machine: str
    versions: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_cost", description=__doc__)
    parser.add_argument("--numel", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="elements of the shard")
    parser.add_argument("--runs", type=int, default=7, help="of each case (default 7)")
    parser.add_argument("--device", help="where the shards lie (default: where the peer group needs them)")
    parser.add_argument("--report", action="store_true", help="only draw")
    arguments = parser.parse_args()
    table = Table(FOLDER / "sync_cost.csv", Case, Cost)
    if not arguments.report:
        torch.set_num_threads(1)
        backend = "gloo" if arguments.device else "auto"
        world = carve(int(os.environ["WORLD_SIZE"]), peer_backend=backend, timeout_s=300)
        exchange = Exchange(world, bucket_mb=64)
        device = arguments.device or world.peers.device.type
        for case in _cases(arguments.numel, world.layout.num_particles, device):
            if case not in table.rows:
                cost = measure(case, exchange, arguments.runs)
                if world.coordinator.is_leader:
                    table.add(case, cost)
                    print(f"{case.rule} {case.wire} {case.numel:.0e}: {_ratios(case, cost)}", flush=True)
        leads = world.coordinator.is_leader
        world.close()
        if not leads:
            return 0
    print(write_report(table))
    return 0


def _cases(sizes: list[float], P: int, device: str) -> list[Case]:
    plain = [Case(rule, "fp32", int(numel), P, device) for numel in sizes for rule in MODES]
    return plain + [Case("local_sgd", wire, int(numel), P, device) for numel in sizes for wire in FORMATS]


def measure(case: Case, exchange: Exchange, runs: int) -> Cost:
    torch.manual_seed(exchange.particle)
    x = torch.randn(case.numel, device=case.device)
    rule = _rule(case.rule)
    differences = None if case.wire == "fp32" else Differences(find_format(case.wire), [torch.zeros_like(x)])
    updater = Updater(exchange, rule, [], [rule.init_state(x)], differences)
    alive = (True,) * case.particles
    fitness = tuple(float(i) for i in range(case.particles))
    memory: Mapping[str, Any] = {}

    def sync(index: int) -> None:
        nonlocal memory
        plan = rule.plan(SyncPoint(index, fitness, alive, total=100), memory)
        updater.carry_out(plan, [x])
        updater.take_distance()
        memory = plan.memory

    copies = _copies(case, x, exchange.device)
    payload = torch.ones(_payload(case, x), dtype=torch.uint8, device=exchange.device)
    if case.wire == "fp32":
        payload = torch.ones_like(x, device=exchange.device)
    times: dict[str, list[float]] = {"pass": [], "bare": [], "collectives": [], "rest": []}
    for index in range(runs + 1):
        times["pass"].append(_timed(lambda: [target.copy_(source) for target, source in copies], exchange, case)[0])
        times["bare"].append(_timed(lambda: _bare(case, exchange, payload), exchange, case)[0])
        whole, collectives = _timed(partial(sync, index), exchange, case)
        times["collectives"].append(collectives)
        times["rest"].append(whole - collectives)
    mine = [median(values[1:]) for values in times.values()]  # the first one warms up
    slowest = [max(column) for column in zip(*exchange.all_gather(mine), strict=True)]
    pass_s, bare_s, collectives_s, rest_s = slowest
    return Cost(pass_s, bare_s, collectives_s, rest_s, runs, machine(), versions())


def _rule(name: str) -> Rule:
    kind = RULES[name]
    return kind(kind.Config(**OPTIONS.get(name, {})))


def _passes(rule: str) -> tuple[int, int]:
    """How many tensors like the shard must be read and written: what is sent and received, x and the state."""
    state = len(_rule(rule).state_names)
    return 2 + 1 + state, 1 + 1 + state  # x into the bucket; what arrived, x and the state; x and the state


def _copies(case: Case, x: Tensor, between: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(to, from): what reads and writes as many bytes as the rule must, to the peer group's device and back too."""
    tensors = sum(_passes(case.rule))  # as large as the shard; a copy is two
    shards = [(torch.empty_like(x), torch.ones_like(x)) for _ in range(tensors // 2)]
    if tensors % 2:
        half = x.numel() // 2
        shards.append((torch.empty_like(x[:half]), torch.ones_like(x[:half])))
    if between.type != x.device.type:
        bucket = torch.ones_like(x, device=between)
        shards[0], shards[1] = (bucket, shards[0][1]), (shards[1][0], bucket)
    return shards


def _payload(case: Case, x: Tensor) -> int:
    return x.numel() * 4 if case.wire == "fp32" else find_format(case.wire).nbytes(x.numel() // 256 * 256)


def _bare(case: Case, exchange: Exchange, payload: Tensor) -> None:
    group = exchange.world.peers.group
    if case.rule == "pso":
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        group.broadcast([payload], options).wait()
    elif case.wire == "fp32":
        group.allreduce([payload]).wait()
    else:
        # As many bytes as a two-phase exchange: a part to each peer, and then a part from each.
        part = payload.numel() // case.particles
        sizes = [part * (i != exchange.particle) for i in range(case.particles)]
        sent = payload[: sum(sizes)]
        group.alltoall_base(torch.empty_like(sent), sent, sizes, sizes).wait()
        rows = [torch.empty_like(payload[:part]) for _ in range(case.particles)]
        group.allgather([rows], [payload[:part]]).wait()


def _timed(job: Callable[[], Any], exchange: Exchange, case: Case) -> tuple[float, float]:
    """Seconds of the job, and of them inside ``Exchange``'s collectives."""
    exchange.all_gather([0.0])  # begin together
    before = exchange.traffic.seconds
    if case.device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    job()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, exchange.traffic.seconds - before


def _ratios(case: Case, cost: Cost) -> str:
    return (
        f"exchange {cost.collectives_s / cost.bare_s:.2f} of the bare collective, "
        f"rest {cost.rest_s / cost.pass_s:.2f} of a memory pass"
    )


def write_report(table: Table[Case, Cost]) -> Path:
    rows = table.rows
    some = next(iter(rows.values()))
    lines = [
        "# sync_cost",
        "",
        f"Made by `torchrun --nproc_per_node {next(iter(rows)).particles} -m benchmarks.sync_cost` on "
        f"{' and '.join(sorted({row.machine for row in rows.values()}))} with {some.versions}; medians of {some.runs} "
        "runs, of the slowest rank.",
        "",
        "One shard on each of P ranks of one machine, no model. *exchange*: time inside collectives over the time of "
        "one bare collective of the same bytes (an all-reduce; for `pso` a broadcast; for rounded differences an "
        "all-to-all and an all-gather). *rest*: all other time (filling buckets, rounding, updating, measuring the "
        "drift) over the time of copying as many bytes as the rule must read and write. Both from the same run.",
        "",
        "| rule | wire | shards on | elements | exchange, s | of the bare collective | rest, s | of a memory pass |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, cost in sorted(rows.items(), key=lambda item: (item[0].numel, item[0].wire != "fp32")):
        lines.append(
            f"| `{case.rule}` | {case.wire} | {case.device} | {case.numel:,} | {cost.collectives_s:.3f} | "
            f"{cost.collectives_s / cost.bare_s:.2f} | {cost.rest_s:.4f} | {cost.rest_s / cost.pass_s:.2f} |"
        )
    if CLAIMS.exists():
        lines += ["", *CLAIMS.read_text(encoding="utf-8").splitlines()]
    page = table.path.with_suffix(".md")
    write_atomically(page, "\n".join(lines) + "\n")
    return page


if __name__ == "__main__":
    sys.exit(main())
