"""Tries ds_pso on a GPU, from this source folder, in a few minutes: prints a table, and writes it as a page.

    python tests/gpu_check.py                        every check, as far as 8 minutes reach
    python tests/gpu_check.py --only bf16 resume     some of them
    python tests/gpu_check.py --device cpu           the same checks on a CPU, with small models

Each check has processes of its own and a time limit; one that fails or hangs is a row of the table and stops no other.
The most important come first, and what no longer fits into the time is listed as not tried. torch, transformers and
accelerate must be there. DeepSpeed, pydantic and hjson may come from a folder of wheels that ``make gpu-wheels`` has
made: they are unpacked, not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu.page import Row, line, markdown, summary
from gpu.ranks import ROOT, Outcome, Ranks, python_path
from gpu.table import CHECKS, Check

_LEAST_S = 10.0  # with less time left no check begins
_VERSIONS = """
import json, platform, torch, deepspeed, transformers, accelerate
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
found = {"GPU": gpu, "CUDA": torch.version.cuda or "", "Python": platform.python_version()}
print(json.dumps(found | {m.__name__: m.__version__ for m in (torch, deepspeed, transformers, accelerate)}))
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    page: Path = arguments.output
    page.parent.mkdir(parents=True, exist_ok=True)
    wanted = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
    print(f"{len(wanted)} checks on {arguments.device}, {arguments.minutes:g} minutes", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        paths = [unpack(arguments.wheels, folder / "packages")] if arguments.wheels.is_dir() else []
        environment = os.environ | {"PYTHONPATH": python_path(paths)}
        command = [sys.executable, "-c", _VERSIONS]
        asked = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for row in run_checks(wanted, arguments.device, 60 * arguments.minutes, folder, paths):
            rows.append(row)
            print(line(*row), flush=True)
            write(page, rows, {})  # whoever stops it here has what was found
        write(page, rows, machine(asked))
    print(f"{summary(rows)}; {page}")
    return 1 if any(outcome.state == "failed" for _, outcome in rows) else 0


def run_checks(
    checks: Sequence[Check], device: str, seconds: float, folder: Path, paths: Sequence[Path] = ()
) -> Iterator[Row]:
    """Run them in order, and yield how each ended; while one runs, the processes of the next import.

    Args:
        seconds: for all of them.
        folder: has a folder for each, with logs.
    """
    deadline = time.monotonic() + seconds

    def start(number: int) -> Ranks | None:
        if number >= len(checks) or deadline - time.monotonic() < _LEAST_S:
            return None
        return Ranks(checks[number], folder / checks[number].name, device, paths)

    following = start(0)
    try:
        for number, check in enumerate(checks):
            ranks, following = following, start(number + 1)
            if ranks is None:
                yield check, Outcome("not tried", "no time was left")
            else:
                yield check, ranks.run(check.limit_s, deadline)
    finally:
        if following is not None:
            following.end()


def unpack(wheels: Path, folder: Path) -> Path:
    """Unpack a folder of wheels, and return where the packages lie."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def machine(asked: subprocess.Popen[str]) -> dict[str, str]:
    """Return what the checks ran on, from the answer of ``_VERSIONS``."""
    answer, _ = asked.communicate()
    lines = [text for text in answer.splitlines() if text.startswith("{")]
    return {name: value for name, value in json.loads(lines[-1]).items() if value} if lines else {}


def write(page: Path, rows: Sequence[Row], ran_on: dict[str, str]) -> None:
    """Write the page, by way of a temporary file."""
    temporary = page.with_name(f".{page.name}")
    temporary.write_text(markdown(rows, ran_on), encoding="utf-8")
    temporary.replace(page)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [check.name for check in CHECKS]
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for all checks together (default: %(default)g)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if shutil.which("nvidia-smi") else "cpu", help="of models")
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"of these: {', '.join(names)}")
    add("--output", type=Path, default=Path("runs/gpu_check.md"), help="the page (default: %(default)s)")
    add("--wheels", type=Path, default=ROOT / "gpu_wheels", help="folder of wheels (default: gpu_wheels/ of the clone)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
