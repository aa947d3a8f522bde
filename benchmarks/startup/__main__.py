"""``python -m benchmarks.startup``: the CPU time that ``ds-pso`` takes before it does anything."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

CONFIG = str(Path(__file__).parents[2] / "ds_config_examples/zero2_local_sgd.json")
COMMANDS = {
    "ds-pso --help": ["--help"],
    "ds-pso check": ["check", CONFIG],
    "ds-pso plan": ["plan", CONFIG, "--parameters", "7.5M", "--bandwidth", "100M", "--step-seconds", "0.43"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Run the command in a process of its own; return its user and system time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ds_pso.cli.main", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the median for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each command (default: 5)")
    repeat = parser.parse_args().repeat
    for name, arguments in COMMANDS.items():
        print(f"{name:14} {median(cpu_seconds(arguments) for _ in range(repeat)):6.3f} s of CPU time")


if __name__ == "__main__":
    main()
