"""Sync points in DeepSpeed's own monitor: TensorBoard, W&B, Comet and CSV, by the JSON keys of DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

from ds_pso.metrics.records import SyncRecord

_NUMBERS = (
    *("drift", "staleness", "next_interval"),
    *("seconds", "waited_s", "overlapped_s", "exchange_s", "step_s", "bytes_received", "bandwidth_mbit_s"),
)
OWN_FOLDERS = ("tensorboard", "csv_monitor")  # sections of those that write files
_OF_PARTICLES = {"losses": "loss", "alive": "alive", "weights": "weight", "lr_factors": "lr_factor"}


def give_each_a_folder(ds_config: dict[str, Any], particle: int) -> None:
    """The first rank of every particle has a monitor, and they must not write into one another's files."""
    for name in OWN_FOLDERS:
        section = ds_config.get(name)
        if isinstance(section, dict) and section.get("enabled"):
            section["job_name"] = f"{section.get('job_name', 'DeepSpeedJobName')}/particle_{particle}"


def events(record: SyncRecord, samples: int) -> list[tuple[str, float, int]]:
    """A record of a sync point as DeepSpeed's monitors want it: (name, value, samples so far)."""
    values = record.to_json()
    found = [(f"Swarm/{name}", values[name]) for name in _NUMBERS if values.get(name) is not None]
    for key, name in _OF_PARTICLES.items():
        found += [(f"Swarm/{name}/particle_{i}", value) for i, value in enumerate(values.get(key) or ())]
    return [(name, float(value), samples) for name, value in found if math.isfinite(value)]
