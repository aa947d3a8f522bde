"""``python -m benchmarks.sync_trace``: how many calls one blocking sync makes inside ds_pso, and how deep.

2 particles x 2 ranks, ZeRO 2, ``local_sgd``, fp32, on the CPU; counted on rank 0, in the thread that trains. Whoever
reads or debugs a sync has to follow these calls. A call is one of a Python function of ds_pso, a comprehension
or a resumed generator included; its caller is the nearest function of ds_pso above it, whatever lies between them.
"""

from __future__ import annotations

import argparse
import collections
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

_MODULE_FLAG = "--rank"


@dataclass
class Trace:
    """Calls inside ds_pso.

    Attributes:
        calls: all of them.
        between: of these, from one module into another, by both names.
        deepest: the longest stack of functions of ds_pso.
    """

    calls: int = 0
    between: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    modules: set[str] = field(default_factory=set)
    deepest: list[str] = field(default_factory=list)

    @contextmanager
    def watch(self, package: Path) -> Iterator[None]:
        """Count the calls of the block."""

        def module_of(frame: FrameType) -> str | None:
            path = Path(frame.f_code.co_filename)
            return path.relative_to(package).as_posix() if path.is_relative_to(package) else None

        def look(frame: FrameType, event: str, _: Any) -> None:
            module = module_of(frame) if event == "call" else None
            if module is None:
                return
            above, stack, names = frame.f_back, [], []
            while above is not None:
                if module_of(above):
                    stack.append(module_of(above))
                    names.append((module_of(above), above.f_code.co_name))
                above = above.f_back
            self.calls += 1
            self.modules.add(module)
            if len(stack) + 1 > len(self.deepest):
                self.deepest = [f"{path}:{name}" for path, name in reversed([(module, frame.f_code.co_name), *names])]
            if stack and stack[0] != module:
                self.between[str(stack[0]), module] += 1

        sys.setprofile(look)
        try:
            yield
        finally:
            sys.setprofile(None)


def trace_a_sync() -> Trace:
    """Train a small model for three steps, and trace the third with its sync; called on each rank."""
    import deepspeed
    import torch

    import ds_pso

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "swarm": {"particles": 2, "sync_mode": "local_sgd", "sync_interval": 1},
    }
    trace, package = Trace(), Path(ds_pso.__file__).parent
    with ds_pso.init(config) as swarm:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        swarm.attach(engine)
        for _ in range(2):
            engine.backward(engine(torch.randn(4, 8)).square().mean())
            engine.step()
        engine.backward(engine(torch.randn(4, 8)).square().mean())
        with trace.watch(package):
            engine.step()
    return trace


def main() -> None:
    """Start four ranks, and print what rank 0 has counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="each pair of modules")
    parser.add_argument(_MODULE_FLAG, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        trace = trace_a_sync()
        if os.environ["DS_PSO_TRACE_RANK"] == "0":
            print(
                f"one sync: {trace.calls} calls in {len(trace.modules)} modules, {trace.between.total()} of them from "
                f"one module into another, depth {len(trace.deepest)}"
            )
            for (caller, callee), count in trace.between.most_common() if arguments.verbose else ():
                print(f"{count:4} {caller} -> {callee}")
            print(*trace.deepest if arguments.verbose else (), sep="\n  ")
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(4):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "DS_PSO_TRACE_RANK": rank}
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        environment = os.environ | {name: str(value) for name, value in (places | settings).items()}
        words = [sys.executable, "-m", "benchmarks.sync_trace", _MODULE_FLAG, *(["-v"] if arguments.verbose else [])]
        ranks.append(subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL if rank else None))
    sys.exit(max(abs(process.wait()) for process in ranks))


if __name__ == "__main__":
    main()
