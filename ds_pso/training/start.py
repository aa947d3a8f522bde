"""The frame of a training script: threads on a CPU, quiet libraries, errors in one line, a run folder."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import transformers

from ds_pso.errors import SwarmError
from ds_pso.swarm import Swarm
from ds_pso.utils.atomic_io import write_atomically

log = logging.getLogger(__name__)


def run(body: Callable[[], int | None]) -> int:
    """Run a script's body, and return its exit code; errors that ds_pso foresaw become one line and 1."""
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # of each node: a file may be missing on one only
    if not torch.cuda.is_available():
        settle_on_cpu()
    _quieten()
    try:
        return body() or 0
    except SwarmError as error:
        if is_first_here or not error.agreed:
            print(f"ds_pso: error: {error}", file=sys.stderr, flush=True)
        return 1


def settle_on_cpu() -> None:
    """Let ranks on one machine share its cores instead of each taking all, and need no compiler."""
    if "OMP_NUM_THREADS" not in os.environ:
        world_size = os.environ.get("WORLD_SIZE", "1")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    # DeepSpeed would compile a shared-memory all-reduce at start-up; gloo serves as well here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _quieten() -> None:
    """Keep the output to what a person needs; DeepSpeed calls a deprecated collective at every step."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()


def move_aside(run_dir: Path) -> Path:
    """Rename the folder of an older run, to the next free number, and return its new name. Called on one rank."""
    number = 1
    while (old := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    os.replace(run_dir, old)
    log.info("%s: an older run, which is %s now", run_dir, old)
    return old


def write_record(swarm: Swarm, arguments: argparse.Namespace) -> None:
    """Write ``config.json``: the arguments, and the config with all defaults of its swarm section; on one rank."""
    record = {
        "arguments": {
            key: value if isinstance(value, int | float) else str(value) for key, value in vars(arguments).items()
        },
        "deepspeed": {**swarm.ds_config, "swarm": swarm.config.resolved()},
    }
    run_dir: Path = arguments.output_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.json", json.dumps(record, indent=2) + "\n")
