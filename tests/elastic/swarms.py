"""Elastic swarms in a test: a lighthouse in the test's own process, and particles in processes of the pool."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from integration.jobs import Case
from pool import free_port

ELASTIC = {"transport": "elastic", "timeout_s": 6, "elastic": {"heartbeat_s": 3.0}}


def elastic(case: Case, **more: Any) -> Case:
    """The case, as an elastic swarm; ``more``: of its ``elastic`` section."""
    section = {**ELASTIC, **case.swarm}
    section["elastic"] = {**ELASTIC["elastic"], **section.get("elastic", {}), **more}  # type: ignore[dict-item]
    return replace(case, swarm=section)


@contextlib.contextmanager
def lighthouse(join_s: float = 6.0, heartbeat_s: float = 3.0, port: int = 0) -> Iterator[str]:
    """A lighthouse in this process; yields its URL."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"127.0.0.1:{port}",
        min_replicas=1,
        join_timeout_ms=int(1000 * join_s),
        quorum_tick_ms=50,
        heartbeat_timeout_ms=int(1000 * heartbeat_s),
    )
    try:
        yield f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    finally:
        server.shutdown()


def places(url: str, particles: int, size: int, start: int | None = None) -> Callable[[int], Mapping[str, str]]:
    """What ``ds-pso launch`` puts into the environment of each rank; each particle is a launcher's world of its own."""
    ports = [free_port() for _ in range(particles)]

    def of(rank: int) -> dict[str, str]:
        particle = rank // size
        return {
            "RANK": str(rank % size),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_PORT": str(ports[particle]),
            "DS_PSO_LIGHTHOUSE": url,
            "DS_PSO_PARTICLE": str(particle),
            "DS_PSO_PARTICLES": str(particles),
            "DS_PSO_START": str(start or particles),
            "DS_PSO_HOST": "127.0.0.1",
        }

    return of


def particle() -> int:
    return int(os.environ["DS_PSO_PARTICLE"])
