"""A link between the machines of an elastic swarm is cut and restored, or loses packets: two network namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slow_link.network import INTERFACE, Link, slow_link, why_not
from benchmarks.soak import run as soak
from faults.test_launch import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=f"needs network namespaces: {why_not()}"),
]
STEPS = 800


def launch(folder: Path, config: Path, link: Link, end: int) -> subprocess.Popen[bytes]:
    """The launcher of one machine, with one of the two particles."""
    words = [sys.executable, "-m", "ds_pso.cli.main", "launch", "--particles", "2", "--only", str(end)]
    words += ["--host", link.addresses[end]]
    if end == 1:
        words += ["--lighthouse", f"http://{link.addresses[0]}:29510"]
    words += [str(soak.WORKER), "--deepspeed_config", str(config), "--folder", str(folder)]
    words += ["--steps", str(STEPS), "--pace", "0.1"]
    with (folder / f"launch_{end}.log").open("wb") as log:
        return subprocess.Popen(link.command(end, *words), stdout=log, stderr=subprocess.STDOUT)


def syncs(folder: Path, particle: int) -> list[dict[str, Any]]:
    return [r for r in soak.records(folder) if r["event"] == "sync" and r["particle"] == particle]


def run(tmp_path: Path, disturb: Any) -> Path:
    """Both machines to the end, and what happens to the link after some sync points."""
    folder = tmp_path / "run"
    config = soak.write_config(folder, STEPS)
    with slow_link(1e9) as link:
        processes = [launch(folder, config, link, end) for end in range(2)]
        try:
            wait_until(lambda: len(syncs(folder, 0)) >= 5)
            disturb(folder, link)
            assert [process.wait(300) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.terminate()
                process.wait(90)
    return folder


def test_a_link_is_cut_and_restored(tmp_path: Path) -> None:
    """The machine of the lighthouse goes on; the other waits, and takes over what it has missed."""

    def cut(folder: Path, link: Link) -> None:
        subprocess.run(["ip", "-n", link.namespaces[1], "link", "set", INTERFACE, "down"], check=True)
        alone = len(syncs(folder, 0))
        wait_until(lambda: len(syncs(folder, 0)) >= alone + 5)
        subprocess.run(["ip", "-n", link.namespaces[1], "link", "set", INTERFACE, "up"], check=True)
        wait_until(lambda: bool(syncs(folder, 0)[-1]["present"] == [0, 1]))

    folder = run(tmp_path, cut)
    present = [record["present"] for record in syncs(folder, 0)]
    assert [0] in present
    assert present[-1] == [0, 1]
    assert [1] in [record["recovered"] for record in syncs(folder, 0)]
    assert len(soak.ends(folder)) == 2
    assert len({end["loss"] for end in soak.ends(folder)}) == 1


def test_a_fifth_of_the_packets_is_lost(tmp_path: Path) -> None:
    """TCP sends them again: it is slower, and nothing is lost."""

    def lose(folder: Path, link: Link) -> None:
        for name in link.namespaces:
            words = ["tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "netem", "loss", "20%"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this kernel cannot drop packets: {done.stderr.strip()}")

    folder = run(tmp_path, lose)
    assert len({end["loss"] for end in soak.ends(folder)}) == 1
