"""Command line of ``train.py``. What DeepSpeed's JSON can say is said there, not here."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from ds_pso.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line of ``train.py``; raises ConfigError on a wrong argument."""
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Train a causal language model with a swarm of DeepSpeed ZeRO particles.",
        epilog="Learning rate, schedule, batch, ZeRO, precision and the swarm come from the DeepSpeed JSON.",
    )
    add = parser.add_argument
    add("--deepspeed_config", metavar="JSON", help="DeepSpeed config with a swarm section (default: built in)")
    add(
        "--model",
        default="llama:4x128",
        help="llama:<layers>x<width> to build one, a local folder, or a hub id (default: %(default)s)",
    )
    add(
        "--dataset",
        default="python",
        help="a text file, a folder of text files, a datasets id, or `python`: the source code of "
        "Python's standard library (default)",
    )
    add("--steps", type=positive, default=400, help="optimizer steps (default: %(default)s)")
    add("--seq_length", type=positive, default=128, help="tokens per sample (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("runs/latest"), help="run folder (default: %(default)s)")
    add("--eval_every", type=positive, default=40, help="steps between held-out evaluations (default: %(default)s)")
    add("--save_every", type=positive, help="steps between checkpoints (default: only at the end)")
    add(
        "--keep_checkpoints",
        type=whole,
        default=2,
        metavar="K",
        help="the newest K stay, older ones are removed; 0: all stay (default: %(default)s)",
    )
    add("--save_in_foreground", action="store_true", help="training stops until a checkpoint is written")
    add("--resume", action="store_true", help="continue from the latest checkpoint")
    add("--reshape", action="store_true", help="let --resume take a checkpoint of other numbers of particles or ranks")
    add("-v", "--verbose", action="count", default=0, help="log more (INFO; -vv: DEBUG)")
    add("--seed", type=int, default=0, help="of model, data order and dropout (default: %(default)s)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args(argv)
    if arguments.reshape and not arguments.resume:
        raise ConfigError("--reshape: says how a checkpoint is loaded, and none is; add --resume")
    if arguments.model.startswith("llama:"):
        parse_llama(arguments.model)
    return arguments


def positive(text: str) -> int:
    """Parse a whole number of at least 1; a type for ``add_argument``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """Parse a whole number of at least 0; a type for ``add_argument``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 0")
    return int(text)


def parse_llama(model: str) -> tuple[int, int]:
    """Return layers and width of a name such as ``llama:4x128``."""
    match = re.fullmatch(r"llama:([1-9]\d*)x([1-9]\d*)", model)
    if match is None or int(match[2]) % 32:
        raise ConfigError(f"--model {model}: must be llama:<layers>x<width> with a width that 32 divides")
    return int(match[1]), int(match[2])


def read_deepspeed_config(path: str | None, world_size: int) -> str | Mapping[str, object]:
    """Return the path as given, or the built-in config with a number of particles that fits the world."""
    if path is not None:
        return path
    config = built_in_config()
    if world_size % config["swarm"]["particles"]:
        config["swarm"]["particles"] = world_size
    return config


def built_in_config() -> dict[str, Any]:
    """Return the DeepSpeed config of ``train.py`` without ``--deepspeed_config``."""
    text = resources.files("ds_pso.training").joinpath("default_config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def fill_auto(ds_config: dict[str, object], steps: int) -> None:
    """Replace ``"auto"`` in the scheduler section by what the command line knows."""
    scheduler = ds_config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, dict) else None
    params = params if isinstance(params, dict) else {}  # if it is something else DeepSpeed says so
    if params.get("total_num_steps") == "auto":
        params["total_num_steps"] = steps
    left = [f"scheduler.params.{key}" for key, value in params.items() if value == "auto"]
    left += [key for key, value in ds_config.items() if value == "auto"]
    if left:
        raise ConfigError(f'{left[0]} = "auto": train.py only knows scheduler.params.total_num_steps; give a number')
