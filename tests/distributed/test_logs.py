"""Logging: who speaks stands in each line, and a program's own set-up is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

SCRIPT = """
import logging, sys, threading
from ds_pso.distributed import logs
{before}
logs.configure({verbosity})
log = logging.getLogger("ds_pso.somewhere")
log.info("before anybody is anybody")
logs.set_place(1, 0)
log.debug("details")
log.info("connected")
log.warning("slow")
"""


def lines(before: str = "", verbosity: int = 0, **environment: str) -> list[str]:
    """What the script prints to stderr, without the time."""
    script = SCRIPT.format(before=before, verbosity=verbosity)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "ConfigError" in done.stderr, done.stderr
    return [" ".join(line.split()[2:]) if line[:2] == "20" else line for line in done.stderr.splitlines()]


SLOW = "WARNING [particle 1 rank 0] ds_pso.somewhere: slow"
CONNECTED = "INFO [particle 1 rank 0] ds_pso.somewhere: connected"
BEFORE = "INFO [no particle yet] ds_pso.somewhere: before anybody is anybody"
DETAILS = "DEBUG [particle 1 rank 0] ds_pso.somewhere: details"


@pytest.mark.parametrize(
    ("verbosity", "environment", "expected"),
    [
        (0, {}, [SLOW]),
        (0, {"DS_PSO_LOG": ""}, [SLOW]),
        (0, {"DS_PSO_LOG": "INFO"}, [BEFORE, CONNECTED, SLOW]),
        (0, {"DS_PSO_LOG": "debug"}, [BEFORE, DETAILS, CONNECTED, SLOW]),
        (0, {"DS_PSO_LOG": "ERROR"}, []),
        (1, {}, [BEFORE, CONNECTED, SLOW]),
        (2, {}, [BEFORE, DETAILS, CONNECTED, SLOW]),
        (1, {"DS_PSO_LOG": "ERROR"}, [BEFORE, CONNECTED, SLOW]),
    ],
)
def test_the_level(verbosity, environment, expected):
    assert lines(verbosity=verbosity, **environment) == expected


def test_a_level_that_there_is_not_is_named():
    assert "DS_PSO_LOG = 'loud': must be one of DEBUG, INFO, WARNING, ERROR" in lines(DS_PSO_LOG="loud")[-1]


def test_a_program_that_logs_itself_gets_the_records():
    own = "logging.basicConfig(level=logging.INFO, format='mine: %(message)s')"
    assert lines(before=own) == ["mine: before anybody is anybody", "mine: connected", "mine: slow"]


def test_configuring_twice_prints_once():
    assert lines(before="logs.configure()") == [SLOW]


def test_simulated_particles_have_places_of_their_own():
    import logging

    from ds_pso.distributed import logs

    found = {}

    def live(particle: int) -> None:
        logs.set_place(particle, 0, of_thread=True)
        record = logging.LogRecord("ds_pso", logging.INFO, "", 0, "", (), None)
        logs._Place().filter(record)
        found[particle] = record.place

    threads = [threading.Thread(target=live, args=(particle,)) for particle in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == {0: "particle 0 rank 0", 1: "particle 1 rank 0"}


TRACEBACK = """
import torch.distributed as dist
from ds_pso.distributed import logs
for _ in range(2):
    logs.head_tracebacks()
logs.set_place(1, 0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
logs.head_tracebacks()
raise OSError("full")
"""


def test_a_traceback_says_whose_it_is_where_torch_says_rank_0_in_every_particle():
    done = subprocess.run([sys.executable, "-c", TRACEBACK], capture_output=True, text=True, check=False)
    found = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]
    assert found[:2] == ["[rank0]: particle 1 rank 0:", "[rank0]: Traceback (most recent call last):"]
    assert found[-1] == "[rank0]: OSError: full"
    assert done.stderr.count("particle 1") == 1
