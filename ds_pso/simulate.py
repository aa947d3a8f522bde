"""Runs a whole swarm in one process: to try a rule on a laptop, and for large grids of small runs."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ds_pso.config.schema import ConfigSource
from ds_pso.distributed.simulated_world import Simulation
from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm, init

Result = TypeVar("Result")


def simulate(
    config: ConfigSource, train: Callable[[Swarm], Result], *, run_dir: str | Path | None = None
) -> list[Result]:
    """Call ``train`` once for every particle of ``config``, all in this process.

    Each particle is a thread with its own DeepSpeed engine of one rank; one of them computes at a
    time, and they sync by the very rules and schedules of a real swarm. So the
    weights are those of P processes of one rank each, up to the order in which P > 2 numbers are added.

    Args:
        config: DeepSpeed's JSON config with a ``swarm`` section, as a path or a mapping.
        train: a function of a swarm, as a script would have after ``ds_pso.init``.
        run_dir: as for ``ds_pso.init``.

    Returns:
        What ``train`` returned, in the order of particles.

    Raises:
        ConfigError: bad config; several ranks were started; ``"particles": "node"``.
        Exception: whatever ``train`` raised first.
    """

    def live() -> Result:
        with init(config, run_dir=run_dir) as swarm:
            return train(swarm)

    return Simulation(live).run()


def simulate_script(script: str | Path, arguments: Sequence[str] = ()) -> int:
    """Run a script that calls ``ds_pso.init`` once for every particle; returns its exit code.

    Each particle executes it anew, as ``__main__`` and with the same arguments.

    Raises:
        ConfigError: the script cannot be read.
    """
    path = Path(script)
    try:
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be run ({error}); give a Python script") from error

    def live() -> int:
        main = types.ModuleType("__main__")
        main.__file__ = str(path.absolute())
        sys.modules["__main__"] = main
        try:
            exec(code, vars(main))
        except SystemExit as end:
            if end.code is not None and not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        return 0

    with _as_main(path, arguments):
        return next(filter(None, Simulation(live).run()), 0)


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Give ``sys`` the values that ``python script.py arguments`` finds there."""
    argv, folders, main = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = argv, folders, main
