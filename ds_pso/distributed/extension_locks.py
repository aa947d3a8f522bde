"""Warns of locks that killed processes have left where torch compiles extensions: torch waits for them for ever."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

_SURELY_DONE_S = 300.0  # after which nobody is compiling any more; the longest takes two minutes on two cores


def warn_of_old_locks(environment: Mapping[str, str] = os.environ) -> None:
    """Warn of each lock that is older than any compilation takes."""
    root = environment.get("TORCH_EXTENSIONS_DIR")
    locks = Path(root).glob("*/lock") if root else (Path.home() / ".cache/torch_extensions").glob("*/*/lock")
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:  # gone meanwhile
            continue
        if age > _SURELY_DONE_S:
            warnings.warn(
                f"{lock}: a process that was compiling {lock.parent.name} for DeepSpeed was killed {age / 60:.0f} "
                "minutes ago, and whoever needs it waits for ever; if nothing is being compiled, delete this file",
                stacklevel=3,
            )
