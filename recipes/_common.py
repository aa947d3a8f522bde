"""Shared by the recipes: arguments, what fills DeepSpeed's "auto" under Accelerate, and a loop of so many steps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn

from ds_pso.swarm import Swarm
from ds_pso.training.arguments import Parser, positive
from ds_pso.training.start import move_aside, write_record

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Batch = TypeVar("Batch")


def make_parser(name: str, what: str, *, steps: int, batch_size: int, lr: float) -> Parser:
    """Make a parser of the arguments that every recipe has, with its defaults; a recipe adds its own."""
    parser = Parser(
        prog=f"{name}.py",
        allow_abbrev=False,
        description=what,
        epilog='--batch_size, --lr, --weight_decay and --steps fill what is "auto" in the DeepSpeed JSON that '
        "accelerate launch names; a number there counts.",
    )
    add = parser.add_argument
    add("--steps", type=positive, default=steps, help="optimizer steps (default: %(default)s)")
    add(
        "--batch_size",
        type=positive,
        default=batch_size,
        help="samples per rank and micro batch (default: %(default)s)",
    )
    add("--lr", type=float, default=lr, help="learning rate (default: %(default)s)")
    add("--weight_decay", type=float, default=0.01, help="of the optimizer (default: %(default)s)")
    add("--seed", type=int, default=0, help="of model, data order and dropout (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("runs") / name, help="run folder (default: %(default)s)")
    add("--smoke", action="store_true", help="a small model on data made on the spot: under a minute on a CPU")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None, **smoke: object) -> argparse.Namespace:
    """Parse the arguments; ``smoke`` are the defaults under ``--smoke``. Raises ConfigError on a wrong one."""
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        parser.set_defaults(**smoke)
        arguments = parser.parse_args(argv)
    return arguments


def begin(swarm: Swarm, arguments: argparse.Namespace) -> None:
    """Make a run folder, and print a line that says what runs. Called on all ranks."""
    with swarm.world.coordinator.agree("preparing the run folder"):
        if swarm.is_leader:
            if (arguments.output_dir / "config.json").exists():
                move_aside(arguments.output_dir)
            write_record(swarm, arguments)
            print(f"{swarm.describe()}; run folder {arguments.output_dir}", flush=True)


def make_once(swarm: Swarm, folder: Path, make: Callable[[Path], None]) -> str:
    """Return the folder, after ``make(folder)`` on one rank for each disk. Called on all ranks."""
    leads = swarm.world.coordinator.leads_disk(folder)
    with swarm.world.coordinator.agree(f"making {folder}"):
        if leads:
            make(folder)
    return str(folder)


def batch_size(swarm: Swarm, arguments: argparse.Namespace) -> int:
    """Return the size of a micro batch: the number in the JSON, and where that says ``"auto"``, the argument."""
    given = swarm.ds_config.get("train_micro_batch_size_per_gpu")
    return given if isinstance(given, int) else arguments.batch_size


def stand_ins(swarm: Swarm, model: nn.Module, arguments: argparse.Namespace) -> list[DummyOptim | DummyScheduler]:
    """Return, for ``swarm.prepare``, stand-ins for the optimizer and the scheduler that the JSON describes.

    It fills what is ``"auto"`` there from them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = DummyOptim(trained, lr=arguments.lr, weight_decay=arguments.weight_decay)
    if "scheduler" not in swarm.ds_config:
        return [optimizer]
    # Accelerate counts the steps of all ranks, and divides.
    total = arguments.steps * swarm.world.layout.world_size
    return [optimizer, DummyScheduler(optimizer, total_num_steps=total, warmup_num_steps=arguments.steps // 20)]


def batches(swarm: Swarm, engine: DeepSpeedEngine, loader: Iterable[Batch], num_steps: int) -> Iterator[Batch]:
    """Yield micro batches until ``engine`` has taken ``num_steps`` steps, epoch after epoch; prints progress."""
    every, shown, start = max(1, num_steps // 10), 0, time.time()
    while True:
        for batch in loader:
            yield batch
            step = engine.global_steps
            if step // every > shown and swarm.is_leader:
                losses = " ".join(f"{loss:.3f}" for loss in swarm.last_losses[:8])
                loss_text = f" | loss at the last sync point {losses}" if swarm.totals.count else ""
                print(f"step {step:>5}/{num_steps}{loss_text} | {time.time() - start:.0f} s", flush=True)
            shown = step // every
            if step >= num_steps:
                return


def finish(swarm: Swarm, arguments: argparse.Namespace, name: str, value: float) -> None:
    """Write and print the final metric, once."""
    swarm.log("final", **{name: value})
    if swarm.is_leader:
        who = "one particle" if swarm.num_particles == 1 else f"the consensus of {swarm.num_particles} particles"
        print(f"final {name} {value:.4f} ({who}); everything is in {arguments.output_dir}", flush=True)
