"""One end of the link: trains in one stack and prints what it measured. Started by ``__main__``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.slow_link.ends import tell
from benchmarks.slow_link.network import received_bytes
from benchmarks.slow_link.runs import Run
from benchmarks.slow_link.stacks import Stack, batches, stack_of

LAST = 8  # steps over whose losses the mean is taken


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    data, interface = batches(int(os.environ["RANK"])), os.environ["GLOO_SOCKET_IFNAME"]
    warmup, measured = run.steps
    with stack_of(run) as stack:
        losses = [stack.step(next(data)) for _ in range(warmup)]
        losses += _go_to_a_sync_point(run, stack, data)
        begin, bytes_before, before = time.perf_counter(), received_bytes(interface), stack.syncs()
        found = [stack.step(next(data)) for _ in range(measured)]
        found += _go_to_a_sync_point(run, stack, data)
        seconds, received = time.perf_counter() - begin, received_bytes(interface) - bytes_before
        tell(
            {
                "step_s": seconds / len(found),
                "bytes_per_step": received / len(found),
                "steps_per_sync": len(found) / (stack.syncs() - before) if run.schedule != "fixed" else 0.0,
                "loss": float(torch.stack((losses + found)[-LAST:]).mean()),
                "steps": len(losses) + len(found),
            }
        )
    sys.stdout.flush()
    os._exit(0)  # some stacks do not end by themselves


def _go_to_a_sync_point(run: Run, stack: Stack, data: Iterator[Tensor]) -> list[Tensor]:
    """Where the interval is not known: as many steps as there are until the next one is over; their losses."""
    losses, before = [], stack.syncs()
    while run.schedule != "fixed" and stack.syncs() == before:
        losses.append(stack.step(next(data)))
    return losses


if __name__ == "__main__":
    main()
