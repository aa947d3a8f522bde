"""One end of the link: trains in one stack and prints what it measured. Started by ``__main__``."""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from benchmarks.slow_link.network import received_bytes
from benchmarks.slow_link.runs import Run
from benchmarks.slow_link.stacks import batches, stack_of

MARK = "slow_link result: "


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    data = batches(int(os.environ["RANK"]))
    warmup, measured = run.steps
    with stack_of(run) as step:
        for _ in range(warmup):
            step(next(data))
        begin, bytes_before = time.perf_counter(), received_bytes()
        for _ in range(measured):
            step(next(data))
        seconds, received = time.perf_counter() - begin, received_bytes() - bytes_before
        print(MARK + json.dumps({"step_s": seconds / measured, "bytes_per_step": received / measured}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some stacks do not end by themselves


if __name__ == "__main__":
    main()
