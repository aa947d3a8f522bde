"""Metrics that tests of the report write themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]
SWARM = {"particles": 2, "sync_mode": "swarm", "sync_interval": 4, "wire": "int4", "delay": 0, "fitness": "train"}


def start(step: int = 0, time_s: float = 2.0, **others: Any) -> dict[str, Any]:
    values = {
        "description": "2 particles x 3 ranks, swarm every 4 steps",
        "particles": 2,
        "ranks": 3,
        "backend": "gloo",
        "total_steps": None,
        "zero_stage": 2,
        "parameters": 1_500_000,
        "swarm": SWARM,
        "versions": {"ds_pso": "0.1.0"},
    }
    return {"event": "start", "step": step, "time_s": time_s, **values, **others}


def sync(step: int, time_s: float, losses: list[float | None], **others: Any) -> dict[str, Any]:
    values = {"sync": step // 4 - 1, "losses": losses, "alive": [True] * len(losses), "bytes_received": 1_000_000}
    times = {"seconds": 0.5, "waited_s": 0.25, "exchange_s": 0.125, "bandwidth_mbit_s": 64.0, "drift": 0.02}
    return {"event": "sync", "step": step, "time_s": time_s, **values, **times, **others}


def losses(event: str, step: int, time_s: float, values: list[float | None]) -> dict[str, Any]:
    return {"event": event, "step": step, "time_s": time_s, "losses": values}


def small() -> Records:
    """Ten seconds of two particles, every number of the table easy to see."""
    return [
        start(),
        losses("held_out", 0, 3.0, [8.0, 8.0]),
        sync(4, 5.0, [4.0, 2.0], bytes_received=3_000_000, seconds=1.0, weights=[0.25, 0.75], lr_factors=[1.0, 2.0]),
        sync(8, 8.0, [2.5, 2.0], weights=[0.5, 0.5], lr_factors=[0.5, 4.0], guard="weighted"),
        sync(12, 11.0, [1.5, None], alive=[True, False], weights=[1.0, 0.0], lr_factors=[0.5, 1.0], guard="mean"),
        losses("train", 12, 11.5, [2.6, 2.4]),
        losses("held_out", 12, 12.0, [3.0, 5.0]),
        losses("exported", 12, 20.0, [3.5]),
    ]


def write(folder: Path, records: Records, rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + rest, encoding="utf-8")
    return folder
