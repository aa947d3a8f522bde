"""The ``elastic`` section: when a swarm goes on without a particle."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_pso.utils.strict_model import StrictModel


class ElasticConfig(StrictModel):
    """Options of ``"transport": "elastic"``."""

    min_particles: int = Field(
        default=1, ge=1, description="With fewer for longer than `timeout_s`, training ends with an error."
    )
    straggler: Literal["wait", "skip", "async"] = Field(
        default="wait",
        description="How long a sync point waits for a particle that is alive and late: `wait`: for `timeout_s`; "
        "`skip`: for `straggler_s`; what a particle that is left out has learned since its last sync point is lost. "
        "`async`: as `skip`, but its work counts at its next sync point (for rules without state).",
    )
    straggler_s: float = Field(default=30.0, gt=0, le=10_000_000, description="See `straggler`; seconds.")
    heartbeat_s: float = Field(
        default=10.0, ge=0.5, le=3600, description="A particle that has given no sign of life for so long is gone."
    )
