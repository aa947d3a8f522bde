"""What the particles of the soak train: a small classifier, slowly, with a record of every sync point.

Started by ``ds-pso launch``. A file ``fault_<particle>`` in the folder asks it to do something to itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ds_pso
from ds_pso.checkpoint import writer
from ds_pso.errors import CheckpointError
from ds_pso.shards import find_shards

FEATURES, CLASSES, TRAIN, HELD_OUT, BATCH = 32, 10, 65536, 8192, 16
# What a particle does to itself, as nobody else could do it at the right moment.
AT_ITSELF = (
    "killed in an exchange",
    "killed while saving",
    "NaN loss",
    "NaN weights",
    "flipped bit",
    "exploding learning rate",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--deepspeed_config", required=True)
    add("--folder", type=Path, required=True)
    add("--steps", type=int, required=True)
    add("--pace", type=float, default=0.0, help="seconds to sleep after each step")
    add("--save_every", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--resume", action="store_true")
    add("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the start; gloo serves here
    try:
        with ds_pso.init(arguments.deepspeed_config, run_dir=arguments.folder) as swarm:
            train(swarm, arguments)
    except ds_pso.SwarmError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def train(swarm: Any, arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, CLASSES))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
    swarm.attach(engine)
    train_data, held_out = data()
    sampler = swarm.sampler(train_data, batch_size=BATCH, seed=arguments.seed)
    loader = DataLoader(train_data, batch_size=BATCH, sampler=sampler)
    checkpoints, own = arguments.folder / "checkpoints", swarm.run_dir
    if arguments.resume or int(os.environ.get("DS_PSO_ATTEMPT", "0")) > 0:
        try:
            swarm.load(checkpoints)
        except CheckpointError as error:
            print(f"starts without a checkpoint: {error}", flush=True)
    log = Log(own / "soak.jsonl")
    log.write(event="start", step=engine.global_steps, attempt=int(os.environ.get("DS_PSO_ATTEMPT", "0")))
    seen = swarm.totals.count
    while engine.global_steps < arguments.steps:
        for x, y in loader:
            loss = nn.functional.cross_entropy(engine(x), y)
            what = asked(arguments.folder / f"fault_{swarm.particle}")
            if what == "NaN loss":
                loss = loss * math.nan
            elif what and what.startswith("killed"):
                be_killed(what, swarm, log)
            elif what:
                go_mad(what, engine)
            if what and not what.startswith("killed"):
                log.write(event="fault", step=engine.global_steps, what=what)
            engine.backward(loss)
            engine.step()
            if swarm.totals.count != seen:
                seen, sync = swarm.totals.count, swarm.last_sync
                assert sync is not None
                values = {"present": sync.present, "recovered": sync.recovered, "alive": sync.alive}
                log.write(event="sync", step=engine.global_steps, **values)
            step, stop = engine.global_steps, swarm.should_stop()
            if step % arguments.save_every == 0 or step >= arguments.steps or stop:
                swarm.save(checkpoints, keep=2, background=not stop)
            if stop:
                raise SystemExit(ds_pso.EXIT_PREEMPTED)
            if step >= arguments.steps:
                break
            time.sleep(arguments.pace)
    engine.eval()
    with torch.no_grad():
        x, y = held_out.tensors
        logits = engine(x)
    loss = float(nn.functional.cross_entropy(logits, y))
    log.write(event="end", step=engine.global_steps, loss=loss, accuracy=float((logits.argmax(1) == y).float().mean()))


class Log:
    """Lines with the time, the process and its memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = psutil.Process()

    def write(self, **values: Any) -> None:
        values |= {"time": time.time(), "pid": os.getpid(), "rss": self._process.memory_info().rss}
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def data() -> tuple[TensorDataset, TensorDataset]:
    """Classes that a random network of two layers tells apart, a tenth of the training labels wrong."""
    generator = torch.Generator().manual_seed(1000)
    first = torch.randn(FEATURES, 64, generator=generator) / math.sqrt(FEATURES)
    second = torch.randn(64, CLASSES, generator=generator)
    x = torch.randn(TRAIN + HELD_OUT, FEATURES, generator=generator)
    y = (torch.tanh(2 * x @ first) @ second).argmax(1)
    wrong = torch.rand(TRAIN, generator=generator) < 0.1
    y[:TRAIN][wrong] = torch.randint(CLASSES, (int(wrong.sum()),), generator=generator)
    return TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])


def asked(flag: Path) -> str | None:
    """What the flag asks for, once."""
    try:
        what = flag.read_text()
        flag.unlink()
    except OSError:
        return None
    return what


def go_mad(what: str, engine: Any) -> None:
    target = find_shards(engine).tensors[0]
    with torch.no_grad():
        if what == "NaN weights":
            target[7] = math.nan
        if what == "flipped bit":  # the highest of the exponent
            target[7:8].view(torch.int32).bitwise_xor_(1 << 30)
        if what == "exploding learning rate":  # for this step: then the schedule sets it again
            for group in engine.optimizer.param_groups:
                group["lr"] = 10.0


def be_killed(what: str, swarm: Any, log: Log) -> None:
    """When the next exchange, or the next save, is half done."""

    def kill(*_: Any) -> str:
        log.write(event="fault", step=swarm.engine.global_steps, what=what)
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    if what == "killed while saving":
        writer.hash_file = kill
    if what == "killed in an exchange":
        weighted_mean = swarm.exchange.weighted_mean

        def half(*arguments: Any) -> Iterator[Any]:
            for piece in weighted_mean(*arguments):
                yield piece
                kill()

        swarm.exchange.weighted_mean = half


if __name__ == "__main__":
    main()
