"""One rank: trains as a case says, and prints what memory it took. Started by ``__main__``."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.slow_link.runs import Run
from benchmarks.slow_link.stacks import VOCABULARY, Job, build_model, deepspeed_config, initialize, torchft

MARK = "memory result: "
WIDTH = 768
INTERVAL = 4
TOKENS = 16  # so few that activations do not count


def now() -> int:
    """Bytes in use: of the GPU's allocator, or resident, without what only the C library holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak() -> int:
    """The most since ``forget_peak``."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def trained(stack: str, section: dict[str, Any], syncs: list[int]) -> Iterator[Callable[[], object]]:
    """What makes one step. ``syncs`` gets what each of ds_pso's sync points took beyond what was there before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(VOCABULARY, (1, TOKENS), device=device)
    config = deepspeed_config(2) | {"train_micro_batch_size_per_gpu": 1}
    if stack == "torchft":
        run = Run("torchft", section["sync_mode"], interval=section["sync_interval"])
        with torchft(run, Job(build=lambda: build_model(WIDTH).to(device))) as peer:
            yield lambda: peer.step(ids)
        return
    with contextlib.ExitStack() as exit_stack:
        swarm = None
        if stack == "DeepSpeed":
            os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_PORT=str(29800 + int(os.environ["RANK"])))
        else:
            import ds_pso

            swarm = exit_stack.enter_context(ds_pso.init(config | {"swarm": section}))
            config = swarm.ds_config
        engine = initialize(config, build_model(WIDTH))
        if swarm is not None:
            swarm.attach(engine)
            _watch(swarm, syncs)

        def step_engine() -> None:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

        yield step_engine


def _watch(swarm: Any, syncs: list[int]) -> None:
    """Measure sync points apart from training: one in the background is waited for before training goes on."""
    synchronizer, world = swarm.session.synchronizer, swarm.world
    overlap = synchronizer.overlap

    def measured(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = now()
            forget_peak()
            result = real(*args, **options)
            world.background.settle()
            syncs.append(peak() - before)
            return result

        return call

    synchronizer.sync, overlap.begin = measured(synchronizer.sync), measured(overlap.begin)


def main() -> None:
    stack, section = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    syncs: list[int] = []
    peaks = []
    with trained(stack, section, syncs) as step:
        for _ in range(2 * INTERVAL + INTERVAL - 1):  # ends with nothing pending
            forget_peak()
            step()
            peaks.append(peak())
        found = {"steady": now(), "peak": max(peaks), "sync": max(syncs[1:], default=0)}
        print(MARK + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
