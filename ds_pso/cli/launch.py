"""``ds-pso launch``: an elastic swarm, each particle a DeepSpeed job of its own."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from ds_pso.cli.arguments import Subcommands, add_subcommand, check_at_least
from ds_pso.errors import ConfigError

if TYPE_CHECKING:
    from ds_pso.elastic.supervisor import Supervisor

_PORT = 29510  # of torchft's lighthouse


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "launch",
        help="start an elastic swarm: particles that may die, stall, come back and join",
        description="Start each particle as a DeepSpeed job of its own, restart those that die, and keep the "
        "lighthouse running through which they find each other. The JSON says "
        '"swarm": {"transport": "elastic"}. On several machines: start this on each with its own --only, '
        "the first with --host ADDRESS and the others with --lighthouse and their own --host too.",
        example="ds-pso launch --particles 4 --gpus-per-particle 2 ds_pso/train.py --deepspeed_config elastic.json",
    )
    add = parser.add_argument
    add("--particles", type=int, required=True, metavar="P", help="places in the swarm, on all machines together")
    add(
        "--gpus-per-particle",
        type=int,
        default=1,
        metavar="S",
        help="ranks per particle, or processes on a machine without GPUs (default: %(default)s)",
    )
    add("--only", metavar="N[-M]", help="places that this machine fills, counted from 0 (default: all)")
    add("--start", type=int, metavar="N", help="begin when N particles are there (default: P); others may join later")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="this machine's address on the network that joins the particles; all that listens, listens there "
        "(default: 127.0.0.1, this machine alone)",
    )
    add("--port", type=int, default=_PORT, help=f"of the lighthouse (default: {_PORT})")
    add("--lighthouse", metavar="URL", help="of one that runs elsewhere, such as http://10.0.0.1:29510")
    add("--config", metavar="JSON", help="the DeepSpeed config, if the script does not get it as an argument")
    add(
        "--max-restarts",
        type=int,
        default=10,
        metavar="N",
        help="restarts of a particle in a row, none of which runs for ten minutes (default: %(default)s)",
    )
    add(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for particles to save when this is asked to end (default: %(default)s)",
    )
    add("--log-dir", type=Path, metavar="DIR", help="also write what each particle prints to a file there")
    add("script", help="training script, and after it its arguments")
    add("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the particles, and return when all have ended."""
    return supervisor_of(arguments).run()


def supervisor_of(arguments: argparse.Namespace) -> Supervisor:
    """Return the supervisor for these arguments, after every check that is possible before a start."""
    import torch

    from ds_pso.config.load import load_config, name_of, named_in
    from ds_pso.config.schema import SwarmConfig
    from ds_pso.elastic import launch_env
    from ds_pso.elastic.supervisor import Lighthouse, Supervisor

    size, places = arguments.gpus_per_particle, arguments.particles
    check_at_least(particles=(places, 1), gpus_per_particle=(size, 1), max_restarts=(arguments.max_restarts, 0))
    here = _places(arguments.only, places)
    if arguments.start is not None and not 1 <= arguments.start <= places:
        raise ConfigError(f"--start {arguments.start}: must lie between 1 and --particles = {places}")
    if not Path(arguments.script).is_file():
        raise ConfigError(f"{arguments.script}: no such script")
    path = arguments.config or named_in(arguments.arguments)
    config = load_config(path)[1] if path else SwarmConfig(transport="elastic")
    if path and config.transport != "elastic":
        raise ConfigError(
            f'{name_of(path)}: swarm.transport = "{config.transport}": ds-pso launch starts each particle as a job of '
            'its own; set it to "elastic", or start with deepspeed'
        )
    _check_host(arguments.host)
    wait_s = config.timeout_s if config.elastic.straggler == "wait" else config.elastic.straggler_s
    lighthouse = Lighthouse(arguments.host, arguments.port, wait_s, config.elastic.heartbeat_s)
    url = _checked_url(arguments.lighthouse, arguments.host) if arguments.lighthouse else lighthouse.url
    devices = None
    if torch.cuda.is_available():
        devices = _devices(here, size, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    env = {
        launch_env.LIGHTHOUSE: url,
        launch_env.PARTICLES: str(places),
        launch_env.START: str(arguments.start or places),
        launch_env.HOST: arguments.host,
    }
    if devices is None and "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (len(here) * size)))
    return Supervisor(
        here,
        [arguments.script, *arguments.arguments],
        size,
        devices,
        None if arguments.lighthouse else lighthouse,
        env,
        max_restarts=arguments.max_restarts,
        grace_s=arguments.grace,
        log_dir=arguments.log_dir,
    )


def _places(only: str | None, places: int) -> list[int]:
    if only is None:
        return list(range(places))
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", only)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < places:
        raise ConfigError(
            f"--only {only}: must be a place or a range such as 0-{places - 1}, below --particles = {places}"
        )
    return list(range(first, last + 1))


def _check_host(host: str) -> None:
    try:
        addresses = {item[4][0] for item in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ConfigError(
            f"--host {host}: not an address or name that this machine knows; give one of its own"
        ) from error
    if any(ipaddress.ip_address(address).is_unspecified for address in addresses):
        raise ConfigError(
            f"--host {host}: would listen on every network; give the address of the one for the particles"
        )


def _checked_url(url: str, host: str) -> str:
    parts = urlparse(url)
    try:
        complete = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        complete = None
    if not complete:
        raise ConfigError(f"--lighthouse {url}: must be like http://10.0.0.1:{_PORT}")
    if host in ("127.0.0.1", "localhost", "::1") and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"--lighthouse {url}: particles on other machines could not reach this one at --host {host}; give its "
            "address on their network"
        )
    return url


def _devices(here: list[int], size: int, count: int, visible: str | None) -> dict[int, list[str]]:
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    if len(here) * size > len(names):
        raise ConfigError(
            f"--gpus-per-particle {size}: {len(here)} particles need {len(here) * size} GPUs here, and there are "
            f"{len(names)}; lower it, or fill fewer places with --only"
        )
    return {number: names[i * size : (i + 1) * size] for i, number in enumerate(here)}
