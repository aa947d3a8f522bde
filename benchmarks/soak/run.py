"""One run of the soak's swarm under ``ds-pso launch``: how it is started, and what its particles have written."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
HEARTBEAT_S, TIMEOUT_S = 5.0, 60.0
INTERVAL, SAVE_EVERY = 8, 100


@dataclass(frozen=True)
class Run:
    """What a swarm is started with.

    Attributes:
        steps: of each particle.
        pace: seconds that a particle sleeps after each step; changes nothing that it learns.
        seed: of the first weights and of the order of the data; the data are always the same.
    """

    steps: int
    pace: float = 0.0
    particles: int = 4
    seed: int = 0

    def launch(self, folder: Path) -> subprocess.Popen[bytes]:
        config = write_config(folder, self.steps)
        words = [sys.executable, "-m", "ds_pso.cli.main", "launch", "--particles", str(self.particles)]
        words += ["--port", str(_free_port()), "--max-restarts", "1000", "--log-dir", str(folder / "logs")]
        words += [str(WORKER), "--deepspeed_config", str(config), "--folder", str(folder)]
        words += ["--steps", str(self.steps), "--pace", str(self.pace), "--seed", str(self.seed)]
        words += ["--save_every", str(SAVE_EVERY)]
        with (folder / "launch.log").open("wb") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)


def write_config(folder: Path, steps: int) -> Path:
    """``config.json`` in ``folder``, which is made."""
    folder.mkdir()
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupHoldDecayLR",
            "params": {"total_num_steps": steps, "warmup_max_lr": 0.002, "warmup_num_steps": 20},
        },
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "swarm": {
            "particles": "node",
            "sync_mode": "local_sgd",
            "sync_interval": INTERVAL,
            "transport": "elastic",
            "timeout_s": TIMEOUT_S,
            "bucket_mb": 0.01,  # several in an exchange
            "elastic": {"heartbeat_s": HEARTBEAT_S},
        },
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def records(folder: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """What the particles have written so far, those of one kind or all; a ``particle`` in each."""
    for path in sorted(folder.glob("particle_*/soak.jsonl")):
        particle = int(path.parent.name.removeprefix("particle_"))
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                record = {"particle": particle, **json.loads(line)}
                if event in (None, record["event"]):
                    yield record


def ends(folder: Path) -> list[dict[str, Any]]:
    """The particles that came to the end, with their held-out ``loss`` and ``accuracy``."""
    return list(records(folder, "end"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
