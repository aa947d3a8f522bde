"""Two network namespaces on this machine, joined by a link that is as slow as one likes. Linux, root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "slow0"  # in each namespace
_PORT_QUEUE_S = 0.05  # what waits longer than this in front of the link is dropped, as a switch would


def why_not() -> str | None:
    """What this machine lacks; None if nothing."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"the programs {' and '.join(missing)} are missing; install iproute2"
    if os.geteuid() != 0:
        return "creating network namespaces needs root"
    try:
        with slow_link(1e6):
            return None
    except RuntimeError as error:  # root in a container, a kernel without veth or tbf
        return f"no slow link can be made: {error}"


@dataclass(frozen=True)
class Link:
    """Its two ends, and a port that is free at both, as those that follow it are."""

    namespaces: tuple[str, str] | None
    addresses: tuple[str, str]
    interface: str = INTERFACE
    port: int = 29500

    def command(self, end: int, *command: str) -> list[str]:
        """What runs ``command`` at one end."""
        return ["ip", "netns", "exec", self.namespaces[end], *command] if self.namespaces else list(command)


def loopback(port: int) -> Link:
    """Two ends on this machine without namespaces, for tests: nothing is slow, and what both receive is counted."""
    return Link(None, ("127.0.0.1", "127.0.0.1"), "lo", port)


@contextlib.contextmanager
def slow_link(bits_per_s: float) -> Iterator[Link]:
    """The link, for as long as the block lasts. Both directions have the bandwidth; nothing else leads out."""
    _sweep()
    first, second = names = f"ds_pso_{os.getpid()}_0", f"ds_pso_{os.getpid()}_1"
    link = Link(names, ("10.77.0.1", "10.77.0.2"))
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run(*f"ip -n {first} link add {INTERFACE} type veth peer name {INTERFACE} netns {second}".split())
        # At least what comes between two ticks of the kernel, and a packet of 64 KB as TCP makes them: the kernel would
        # cut it with the time of the core that trains, where a network card does it.
        burst = max(70_000, int(bits_per_s / 8 / 250))
        limit = burst + int(bits_per_s / 8 * _PORT_QUEUE_S)
        for name, address in zip(names, link.addresses, strict=True):
            _run(*f"ip -n {name} addr add {address}/24 dev {INTERFACE}".split())
            _run(*f"ip -n {name} link set {INTERFACE} up".split())
            _run(*f"ip -n {name} link set lo up".split())
            rate = f"rate {bits_per_s:.0f}bit burst {burst} limit {limit}"
            _run(*f"tc -n {name} qdisc add dev {INTERFACE} root tbf {rate}".split())
        yield link
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def received_bytes(interface: str = INTERFACE) -> int:
    """Of this end so far, headers and acknowledgements included."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[0])
    raise RuntimeError(f"no interface {interface}: not at an end of a slow link")


def _sweep() -> None:
    """Remove what a benchmark that was killed has left behind."""
    for path in Path("/run/netns").glob("ds_pso_*_?"):
        if not Path("/proc", path.name.split("_")[2]).exists():
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
