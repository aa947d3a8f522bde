"""One end of the link: trains one row until time is up, and keeps its weights. Started by ``run``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.levers.settings import optimizer_of
from benchmarks.minutes.clock import SharedClock, rate_factor
from benchmarks.minutes.results import Run
from benchmarks.minutes.settings import BATCH, BY_NAME, NUM_ENDS
from benchmarks.minutes.text import batches, build_llama, load_text
from benchmarks.slow_link.ends import tell
from benchmarks.slow_link.network import received_bytes
from benchmarks.slow_link.stacks import Job, Stack, stack_of

# Before PowerSGD compresses: torch's advice is not before the end of the warm-up, but over a slow link each of these
# steps takes seconds.
_UNCOMPRESSED_STEPS = 10


@dataclass(frozen=True)
class Snapshot:
    """The weights of an end at a time."""

    seconds: float
    weights: dict[str, Tensor]


def main() -> None:
    told = json.loads(sys.argv[1])
    run, folder, num_snapshots = Run(**told["run"]), Path(told["folder"]), int(told["snapshots"])
    torch.set_num_threads(1)
    end, row = int(os.environ["RANK"]), BY_NAME[run.row]
    together = row.stack.talks
    clock = SharedClock(folder / ("clock" if together else f"clock_{end}"), NUM_ENDS if together else 1)
    corpus = load_text(Path(told["text"]))
    if together:
        data = batches(corpus.train, BATCH, run.seed, end, NUM_ENDS)
    else:
        data = batches(corpus.train, BATCH, 1000 * end + run.seed)  # two trainings that differ in the order of the data
    optimizer, rates, clipping = optimizer_of(row.inner, run.lr)
    job = Job(
        lambda: build_llama(run.model, corpus, run.seed), optimizer, clipping, BATCH, row.section, _UNCOMPRESSED_STEPS
    )
    with stack_of(row.stack, job) as stack:
        clock.start()
        before = received_bytes(os.environ["GLOO_SOCKET_IFNAME"])
        snapshots, steps = train(stack, clock, rates, 60 * run.minutes, num_snapshots, data)
        received = received_bytes(os.environ["GLOO_SOCKET_IFNAME"]) - before
        for number, snapshot in enumerate(snapshots):
            save_file(snapshot.weights, folder / f"end_{end}_{number}.safetensors")
        clock.finish()
        times = [snapshot.seconds for snapshot in snapshots]
        tell({"end": end, "steps": steps, "times": times, "received": received})
    sys.stdout.flush()
    os._exit(0)  # some stacks do not end by themselves


def train(
    stack: Stack,
    clock: SharedClock,
    rates: float | list[float],
    budget_s: float,
    num_snapshots: int,
    data: Iterator[Tensor],
) -> tuple[list[Snapshot], int]:
    """Train until time is up; return the weights at ``num_snapshots`` times, and the number of steps."""
    peaks = rates if isinstance(rates, list) else [rates] * len(stack.param_groups)
    marks = [budget_s * (number + 1) / num_snapshots for number in range(num_snapshots)]
    snapshots: list[Snapshot] = []
    step = 0
    while True:
        seconds = clock.elapsed(step)
        while marks and seconds >= marks[0]:
            snapshots.append(Snapshot(seconds, _weights(stack)))
            marks.pop(0)
        if not marks:
            return snapshots, step
        for group, peak in zip(stack.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(seconds / budget_s)
        stack.step(next(data))
        step += 1


def _weights(stack: Stack) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stack.module.named_parameters()}


if __name__ == "__main__":
    main()
