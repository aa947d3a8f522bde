"""Runs a test body on W ranks, each a fresh process forked from one that has imported everything.

Importing torch and DeepSpeed takes seconds, forking a process that has done so takes
milliseconds. So the session keeps one fork server (multiprocessing's own), and every job gets
processes of its own: no state leaks from test to test, and a test may kill, stop or starve its
ranks as it likes.

A body is a module-level function; it travels by name, its arguments and result are pickled
through pipes. When a job is late, every rank's Python stack goes into the error and all of its
processes are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[1]
# What deepspeed.initialize would import in every process, seconds each.
PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torch._inductor.compile_fx",
    "torch._inductor.compiler_bisector",
    "torch.onnx",
    "torch.utils.cpp_extension",
    "functorch.compile",
    "distutils.ccompiler",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.trainer",
    # `import ds_pso` is lazy; a rank that imports the rest by itself takes three times the CPU time of its job.
    *(
        ".".join(file.relative_to(_REPOSITORY).with_suffix("").parts)
        for file in sorted((_REPOSITORY / "ds_pso").rglob("*.py"))
        if file.stem != "__init__"
    ),
]
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class JobError(AssertionError):
    """A rank raised, died or was late, and the test did not expect it to."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    value: Any = None
    kind: str | None = None  # name of the exception's type; "Killed" when the process is gone; None: all went well
    text: str = ""  # message of the exception
    trace: str = ""

    def get(self) -> Any:
        if self.kind is not None:
            raise JobError(f"{self.kind}: {self.text}\n{self.trace}")
        return self.value


class Pool:
    """Starts jobs. ``folder`` takes the output and the stacks of the ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        with _environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
            multiprocessing.forkserver.ensure_running()

    def run(self, body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """``body(*args)`` on every rank; the results in the order of ranks. Options: see ``outcomes``."""
        outcomes = self.outcomes(body, *args, **options)
        bad = [f"rank {rank}: {o.kind}: {o.text}\n{o.trace}" for rank, o in enumerate(outcomes) if o.kind is not None]
        if bad:
            raise JobError("\n".join(bad))
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        body: Callable[..., Any],
        *args: Any,
        world_size: int = 4,
        timeout: float = 60.0,
        env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
        silent: tuple[int, ...] = (),
    ) -> list[Outcome]:
        """How every rank ended, exceptions included.

        Args:
            env: more environment variables, or a function of the rank that returns them.
            silent: ranks that will not answer, because the test stops them; their outcome is "Silent".

        Raises:
            JobError: after ``timeout`` seconds, with the stacks of all ranks that still run.
        """
        folder = self._folder / f"job_{self._jobs:04d}_{body.__name__}"
        self._jobs += 1
        folder.mkdir(parents=True)
        port = free_port()
        processes, ends = [], {}
        for rank in range(world_size):
            environment = launcher_environment(rank, world_size, port)
            environment |= (env(rank) if callable(env) else env) or {}
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_serve, args=(theirs, folder, rank, environment, body, args))
            process.start()
            theirs.close()
            processes.append(process)
            ends[rank] = ours
        try:
            outcomes = _collect(ends, time.monotonic() + timeout, silent)
            late = [rank for rank in range(world_size) if rank not in outcomes and rank not in silent]
            if late:
                stacks = _dump_stacks({rank: processes[rank].pid for rank in late}, folder)
                failed = "".join(f"-- rank {r} failed\n{o.trace or o.text}\n" for r, o in outcomes.items() if o.kind)
                raise JobError(f"{body.__name__}: ranks {late} were not done after {timeout:g} s\n{stacks}{failed}")
            return [outcomes.get(rank, Outcome(kind="Silent")) for rank in range(world_size)]
        finally:
            for rank, process in enumerate(processes):
                if rank not in silent and sys.exc_info()[0] is None:
                    process.join(10)  # lets coverage write its data
                process.kill()
                process.join(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets, and the number of ranks under a name that ds_pso leaves alone."""
    values = (rank, world_size, rank, world_size, "127.0.0.1", port, world_size)
    return dict(zip((*LAUNCHER_NAMES, "LAUNCHED_WORLD_SIZE"), map(str, values), strict=True))


def _collect(ends: dict[int, Connection], deadline: float, silent: tuple[int, ...]) -> dict[int, Outcome]:
    """Outcomes by rank of all who answered, or died, before the deadline."""
    open_ends = {end: rank for rank, end in ends.items() if rank not in silent}
    outcomes: dict[int, Outcome] = {}
    while open_ends and time.monotonic() < deadline:
        for end in wait(list(open_ends), deadline - time.monotonic()):
            try:
                outcomes[open_ends[end]] = end.recv()
            except EOFError:
                outcomes[open_ends[end]] = Outcome(kind="Killed", text="the process ended without an answer")
            del open_ends[end]
    return outcomes


def _dump_stacks(pids: dict[int, int], folder: Path) -> str:
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)
    return "\n".join(
        f"-- rank {rank} --\n{(folder / f'stack_{rank}').read_text()}{(folder / f'log_{rank}').read_text()[-2000:]}"
        for rank in pids
    )


def _serve(end: Connection, folder: Path, rank: int, environment: dict[str, str], body: Any, args: Any) -> None:
    """Runs in the rank's process."""
    with (folder / f"log_{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    stack = (folder / f"stack_{rank}").open("w")  # stays open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack)
    for sign, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(sign, handler)  # whoever runs the tests in the background may have them ignored
    os.environ.update(environment)
    import deepspeed
    import torch

    torch.set_num_threads(1)
    # Its build takes a file lock that a killed rank never gives back; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if name := os.environ.get("DS_PSO_SABOTAGE"):  # see sabotage.py
        import sabotage

        sabotage.apply(name)
    try:
        outcome = Outcome(value=body(*args))
    except BaseException as error:
        outcome = Outcome(kind=type(error).__name__, text=str(error), trace=traceback.format_exc())
    sys.stdout.flush()
    end.send(outcome)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
