"""Keeping processes running: with small scripts in place of DeepSpeed jobs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pool import free_port
from variants import slow_but

from ds_pso.elastic import supervisor
from ds_pso.elastic.supervisor import Lighthouse, Supervisor
from ds_pso.errors import ConfigError


class Scripts(Supervisor):
    """Runs the script itself, as the child of another process, as DeepSpeed does."""

    def _command_of(self, number: int) -> Any:
        nested = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        return lambda: [sys.executable, "-c", nested, sys.executable, *self.script]


def supervise(tmp_path: Path, text: str, particles: int = 2, **more: Any) -> tuple[int, float]:
    """Runs in a thread of its own process group's parent; returns the exit code and the seconds."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, pathlib\nhere, n, attempt = pathlib.Path(sys.argv[1]), os.environ"
        "['DS_PSO_PARTICLE'], int(os.environ['DS_PSO_ATTEMPT'])\n" + text
    )
    begin = time.monotonic()
    options = {"size": 1, "devices": None, "lighthouse": None, "env": {}, "log_dir": tmp_path / "logs"} | more
    code = Scripts(range(particles), [str(script), str(tmp_path)], **options).run()
    return code, time.monotonic() - begin


def nobody_left(tmp_path: Path) -> bool:
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return not any(str(tmp_path) in line for line in lines)


def test_all_finish(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _ = supervise(tmp_path, "print('hello from', n)")
    assert code == 0
    assert "[particle 1] hello from 1" in capfd.readouterr().out
    assert (tmp_path / "logs/particle_0.log").read_text() == "hello from 0\n"


def test_who_dies_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        "(here / f'{n}_{attempt}').write_text(os.environ['DS_PSO_LAUNCHER'])\n"
        "if n == '1' and attempt < 2: os.kill(os.getpid(), 9)\n"
    )
    # The other one must not have finished: then nobody is started again.
    code, _ = supervise(tmp_path, text + "while not (here / '1_2').exists(): time.sleep(0.05)")
    assert code == 0
    started = sorted(tmp_path.glob("[01]_*"))
    assert [p.name for p in started] == ["0_0", "1_0", "1_1", "1_2"]
    # Particles compare attempts only if they have one launcher, whose name no other has.
    assert len({p.read_text() for p in started}) == 1
    assert len(started[0].read_text()) == 32
    said = capfd.readouterr().out
    assert "started again in 1 s" in said
    assert "started again in 2 s" in said


def test_nobody_is_started_again_when_others_have_finished(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _ = supervise(tmp_path, "time.sleep(1 if n == '1' else 0)\nsys.exit(int(n))")
    assert code == 0
    assert "others have finished, so it is not started again" in capfd.readouterr().out


@pytest.mark.parametrize("steady", slow_but([False], [False, True]))
def test_who_dies_too_often_is_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, steady: bool
) -> None:
    """What it has done before it last ran for long does not count."""
    if steady:
        monkeypatch.setattr(supervisor, "_STEADY_S", 1.5)
    text = "(here / f'{n}_{attempt}').touch()\nif attempt == 1: time.sleep(2)\nsys.exit(3)"
    code, _ = supervise(tmp_path, text, particles=1, max_restarts=1)
    assert code == 3
    assert "it is given up" in capfd.readouterr().out
    assert len(list(tmp_path.glob("0_*"))) == (3 if steady else 2)


def test_who_is_asked_to_end_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _ = supervise(tmp_path, "time.sleep(1 if n == '0' else 0)\nsys.exit(75 if n == '1' else 0)")
    assert code == 0
    assert "particle 1 was asked to end, and has left the swarm" in capfd.readouterr().out


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_ends_all(tmp_path: Path, obeys: bool) -> None:
    text = """
import signal
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.6)  # told once more meanwhile it would end
    (here / 'saved').touch()
    sys.exit(75)
if n == '1' and OBEYS: signal.signal(signal.SIGTERM, save)
if not OBEYS: signal.signal(signal.SIGTERM, signal.SIG_IGN)
(here / f'up {n}').touch()
time.sleep(100)
"""

    def stop() -> None:
        while not all((tmp_path / f"up {n}").exists() for n in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, took = supervise(tmp_path, text.replace("OBEYS", str(obeys)), grace_s=5.0 if obeys else 1.0)
    assert took < 30
    assert code != 0
    assert (tmp_path / "saved").exists() == obeys
    assert nobody_left(tmp_path)


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Who saves for ever, and whose time to save is not over, is killed."""
    text = """
import signal
signal.signal(signal.SIGTERM, lambda *_: (here / f'asked {n}').touch())
(here / f'up {n}').touch()
while True: time.sleep(1)
"""

    def stop() -> None:
        for name in ("up", "asked"):
            while not all((tmp_path / f"{name} {n}").exists() for n in range(2)):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    threading.Thread(target=stop, daemon=True).start()
    try:
        code, _ = supervise(tmp_path, text, grace_s=1000.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 128 + signal.SIGKILL
    assert "ending the particles at once" in capfd.readouterr().out
    assert nobody_left(tmp_path)


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """Under nohup the terminal may go."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        text = f"os.kill({os.getpid()}, {int(signal.SIGHUP)})\ntime.sleep(1)"
        assert supervise(tmp_path, text, particles=1)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_is_to_be_started_again_is_not_when_all_are_asked_to_end(tmp_path: Path) -> None:
    def stop() -> None:
        while not (tmp_path / "0_0").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, _ = supervise(tmp_path, "(here / f'{n}_{attempt}').touch()\nsys.exit(3)", particles=1, grace_s=5.0)
    assert code == 3
    assert not (tmp_path / "0_1").exists()


def test_the_lighthouse_is_kept_running(tmp_path: Path) -> None:
    port = free_port()
    text = f"""
import socket
def up():
    try: socket.create_connection(('127.0.0.1', {port}), 1).close(); return True
    except OSError: return False
def wait(what):
    while up() != what: time.sleep(0.02)
wait(True)
(here / 'kill').touch()
while not (here / 'killed').exists(): time.sleep(0.02)
wait(True)
"""

    def kill() -> None:
        while not (tmp_path / "kill").exists():
            time.sleep(0.02)
        for child in psutil.Process().children():
            if "torchft_lighthouse" in " ".join(child.cmdline()):
                child.kill()
        (tmp_path / "killed").touch()

    threading.Thread(target=kill, daemon=True).start()
    code, took = supervise(tmp_path, text, particles=1, lighthouse=Lighthouse("127.0.0.1", port, 5.0, 2.0))
    assert code == 0
    assert took < 60
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="the lighthouse cannot listen there"):
            supervise(tmp_path, "", lighthouse=Lighthouse("127.0.0.1", port, 5.0, 2.0))
