"""What ds_pso itself does with the record of a sync; the same way is open to users: ``swarm.on_sync``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from ds_pso.metrics import deepspeed_monitor
from ds_pso.metrics.records import SyncRecord
from ds_pso.session.session import Session
from ds_pso.sync.health import warning

log = logging.getLogger(__name__)


def own_callbacks(session: Session) -> list[Callable[[SyncRecord], None]]:
    """Return the callbacks of a swarm with an engine; those that print and write are the leader's."""
    own: list[Callable[[SyncRecord], None]] = [_write_log] if log.isEnabledFor(logging.DEBUG) else []
    if session.world.is_leader:
        own += [_warn_of_new(), _write_metrics(session)]
        if session.engine.monitor.enabled:
            own.append(_write_monitor(session))
    return own


def _write_log(record: SyncRecord) -> None:
    log.debug(
        "sync %d: %.3f s, waited %.3f s, %d bytes, drift %.4g",
        *(record.sync, record.seconds, record.waited_s, record.bytes_received, record.drift),
    )


def _warn_of_new() -> Callable[[SyncRecord], None]:
    """Warn of particles that are left out, and were not at the sync before."""
    before: SyncRecord | None = None

    def warn(record: SyncRecord) -> None:
        nonlocal before
        text, before = warning(record, before), record
        if text:
            warnings.warn(text, stacklevel=2)

    return warn


def _write_metrics(session: Session) -> Callable[[SyncRecord], None]:
    return lambda record: session.metrics.write("sync", session.attached_engine.global_steps, record.to_json())


def _write_monitor(session: Session) -> Callable[[SyncRecord], None]:
    def write(record: SyncRecord) -> None:
        session.engine.monitor.write_events(deepspeed_monitor.events(record, session.engine.global_samples))

    return write
