"""What ds_pso itself does with the record of a sync; the same way is open to users: ``swarm.on_sync``."""

from __future__ import annotations

import logging
import math
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
        own += [_warn_of_new(session), _write_metrics(session)]
        if session.engine.monitor.enabled:
            own.append(_write_monitor(session))
    return own


def _write_log(record: SyncRecord) -> None:
    log.debug(
        "sync %d: %.3f s, waited %.3f s, %d bytes, drift %.4g",
        *(record.sync, record.seconds, record.waited_s, record.bytes_received, record.drift),
    )


def _warn_of_new(session: Session) -> Callable[[SyncRecord], None]:
    """Warn of particles that are left out, and were not at the sync before; at the first one of pointless training."""
    before: SyncRecord | None = None

    def warn(record: SyncRecord) -> None:
        nonlocal before
        pointless = _pointless(record, session) if before is None else None
        text = warning(record, before) if record.left_out or record.restored else None
        before = record
        for line in (pointless, text):
            if line:
                warnings.warn(line, stacklevel=2)

    return warn


def _pointless(record: SyncRecord, session: Session) -> str | None:
    """Return what is wrong with the training before this sync; None: nothing that can be seen."""
    asynchronous = session.synchronizer is not None and session.synchronizer.gossip is not None
    present = range(session.num_particles) if record.present is None else record.present
    mine = [session.particle] if asynchronous else [i for i in present if i not in (record.recovered or ())]
    alive = [i for i in mine if record.alive[i]]
    losses = [record.losses[i] for i in alive]
    stood_still = record.drift == 0.0 and len(losses) > 1 and losses == losses[:1] * len(losses)
    if record.same_samples or stood_still:
        groups = record.same_samples or [alive]
        who = " and of ".join(", ".join(map(str, group)) for group in groups)
        return (
            f"the batches of particles {who} were the same so far: they train on the same samples, and so learn the "
            "same. Give the DataLoader sampler=swarm.sampler(dataset), or split the data by swarm.world.layout.rank "
            "and .world_size: torch's DistributedSampler and RANK know one particle only; see docs/troubleshooting.md"
        )
    if losses and all(map(math.isnan, losses)) and session.step > 0:
        return (
            "the swarm has seen no loss before its first sync: fitness is unknown, and nobody notices a particle whose "
            "loss explodes. Call engine.backward(loss), not loss.backward()"
        )
    return None


def _write_metrics(session: Session) -> Callable[[SyncRecord], None]:
    return lambda record: session.metrics.write("sync", session.attached_engine.global_steps, record.to_json())


def _write_monitor(session: Session) -> Callable[[SyncRecord], None]:
    def write(record: SyncRecord) -> None:
        session.engine.monitor.write_events(deepspeed_monitor.events(record, session.engine.global_samples))

    return write
