"""One end of the link: trains in one stack and prints what it measured. Started by ``__main__``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.slow_link.network import received_bytes
from benchmarks.slow_link.runs import Run
from benchmarks.slow_link.stacks import Syncs, batches, stack_of

MARK = "slow_link result: "


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    data = batches(int(os.environ["RANK"]))
    warmup, measured = run.steps
    with stack_of(run) as (step, syncs):
        for _ in range(warmup):
            step(next(data))
        _go_to_a_sync_point(run, step, data, syncs)
        begin, bytes_before, before = time.perf_counter(), received_bytes(), syncs()
        for _ in range(measured):
            step(next(data))
        measured += _go_to_a_sync_point(run, step, data, syncs)
        seconds, received = time.perf_counter() - begin, received_bytes() - bytes_before
        found = {"step_s": seconds / measured, "bytes_per_step": received / measured, "steps_per_sync": 0.0}
        if run.schedule != "fixed":
            found["steps_per_sync"] = measured / (syncs() - before)
        print(MARK + json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some stacks do not end by themselves


def _go_to_a_sync_point(run: Run, step: Callable[[Tensor], None], data: Iterator[Tensor], syncs: Syncs) -> int:
    """Where the interval is not known: as many steps as there are until the next one is over."""
    steps, before = 0, syncs()
    while run.schedule != "fixed" and syncs() == before:
        step(next(data))
        steps += 1
    return steps


if __name__ == "__main__":
    main()
