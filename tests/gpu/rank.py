"""What one process of a check does: import, wait for the word to go, run the body, write down how it ended.

    python -m gpu.rank MODULE:FUNCTION FOLDER RANK

Whoever has started it says "go" on its standard input, and closes that to end it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from gpu.table import NotTried


def main(body: str, folder: Path, rank: int) -> None:
    """Run ``body``; the result is ``folder/rank_<i>.json``."""
    faulthandler.register(signal.SIGUSR1)
    module, _, function = body.partition(":")
    result = {"state": "ok", "found": "", "trace": ""}
    try:
        run = getattr(importlib.import_module(f"gpu.{module}"), function)
        folder.joinpath(f"rank_{rank}.ready").touch()
        if not sys.stdin.readline():
            return
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
        result["found"] = run(folder)
    except NotTried as reason:
        result |= {"state": "not tried", "found": str(reason)}
    except BaseException as error:
        said = (str(error).strip().splitlines() or [""])[0]
        result |= {"state": "failed", "found": f"{type(error).__name__}: {said}", "trace": traceback.format_exc()}
    temporary = folder / f".rank_{rank}.json"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(folder / f"rank_{rank}.json")
    sys.stdout.flush()
    os._exit(0)  # what a check has left in the way of threads and process groups ends here


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
