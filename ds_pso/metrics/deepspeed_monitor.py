"""Sync points in DeepSpeed's own monitor: TensorBoard, W&B, Comet and CSV, by the JSON keys of DeepSpeed."""

from __future__ import annotations

import math

from ds_pso.metrics.records import SyncRecord

OWN_FOLDERS = ("tensorboard", "csv_monitor")  # sections of those that write files


def give_each_a_folder(ds_config: dict[str, object], particle: int) -> None:
    """Give the monitor of each particle, which its first rank has, a folder that no other writes into."""
    for name in OWN_FOLDERS:
        section = ds_config.get(name)
        if isinstance(section, dict) and section.get("enabled"):
            section["job_name"] = f"{section.get('job_name', 'DeepSpeedJobName')}/particle_{particle}"


def events(record: SyncRecord, samples: int) -> list[tuple[str, float, int]]:
    """Return the record as DeepSpeed's monitors want it: (name, value, samples so far); what is not finite is left out.

    Args:
        samples: that a particle has seen.
    """
    numbers: dict[str, float] = {
        "drift": record.drift,
        "staleness": record.staleness,
        "next_interval": record.next_interval,
        "seconds": record.seconds,
        "waited_s": record.waited_s,
        "overlapped_s": record.overlapped_s or math.nan,  # nothing went on beside training
        "exchange_s": record.exchange_s,
        "step_s": record.step_s,
        "bytes_received": record.bytes_received,
        "bandwidth_mbit_s": record.bandwidth_mbit_s,
    }
    of_particles = {
        "loss": record.losses,
        "alive": record.alive,
        "weight": record.note.get("weights") or (),
        "lr_factor": record.lr_factors,
        "expert_load_distance": record.expert_load_distances,
    }
    for name, values in of_particles.items():
        numbers |= {f"{name}/particle_{i}": value for i, value in enumerate(values)}
    return [(f"Swarm/{name}", float(value), samples) for name, value in numbers.items() if math.isfinite(value)]
