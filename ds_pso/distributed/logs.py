"""Logging: the level by DS_PSO_LOG or ``--verbose``, and particle and rank in each line."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType

from ds_pso.errors import ConfigError

VARIABLE = "DS_PSO_LOG"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_FORMAT = "%(asctime)s %(levelname)s [%(place)s] %(name)s: %(message)s"
_here = threading.local()  # a simulated particle is a thread
_process_place = ""
_heads = False  # tracebacks


class _Place(logging.Filter):
    """Adds ``place`` to a record: the particle and the rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.place = getattr(_here, "place", "") or _process_place or "no particle yet"
        return True


def set_place(particle: int, rank: int, *, of_thread: bool = False) -> None:
    """Say where this process stands from now on, or this thread alone."""
    global _process_place
    place = f"particle {particle} rank {rank}"
    if of_thread:
        _here.place = place
    else:
        _process_place = place


def head_tracebacks() -> None:
    """Let the traceback of an error that ends this process begin with particle and rank.

    torch marks its lines with the rank in the world of DeepSpeed, which is that of one particle: every particle has
    a ``[rank0]``.
    """
    global _heads
    if _heads:
        return
    before, _heads = sys.excepthook, True

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _process_place:
            print(f"{_process_place}:", file=sys.stderr)
        before(kind, error, trace)

    sys.excepthook = hook


def configure(verbosity: int = 0) -> None:
    """Print what ds_pso logs. A program that has set up logging of its own before gets the records instead.

    Args:
        verbosity: 1: INFO, 2: DEBUG; 0: what DS_PSO_LOG says, else warnings and errors.

    Raises:
        ConfigError: DS_PSO_LOG is no level.
    """
    name = (os.environ.get(VARIABLE) or "WARNING").upper()
    if name not in _LEVELS:
        raise ConfigError(f"{VARIABLE} = {os.environ[VARIABLE]!r}: must be one of {', '.join(_LEVELS)}")
    level = min(getattr(logging, name), {0: logging.ERROR, 1: logging.INFO}.get(verbosity, logging.DEBUG))
    logger = logging.getLogger("ds_pso")
    if verbosity or os.environ.get(VARIABLE):
        logger.setLevel(level)
    if logging.getLogger().handlers or logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_Place())
    logger.addHandler(handler)
    logger.propagate = False
