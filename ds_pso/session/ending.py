"""The last words of a swarm: what went wrong without an error."""

from __future__ import annotations

import sys
import warnings

from ds_pso.session.session import Session


def warn_at_end(session: Session) -> None:
    """Warn of a training that was no training of a swarm, on one rank; for the end of the swarm or of the process."""
    for sampler in session.samplers:
        sampler.check_batches()
    if not session.has_sync_points or not session.is_leader or getattr(sys, "last_value", None) is not None:
        return
    synchronizer, several, text = session.synchronizer, session.num_particles > 1, None
    if session.attached_engine is None:
        apart = "each particle has trained a model of its own, and they never synced"
        lacks = apart if several else "there was no sync point"
        text = (
            f"no engine was attached: if this was a training, {lacks}. Call swarm.attach(engine), or give the Trainer "
            "SwarmCallback(swarm, trainer)"
        )
    elif synchronizer is None:
        return
    elif synchronizer.overlap.pending is not None:
        text = (
            "the swarm is closed while a delayed sync point is pending, which is lost; end training with swarm.sync(), "
            "or give its length in swarm.total_steps"
        )
    elif session.step > 0 and synchronizer.parts.totals.count == 0 and not session.is_merged:
        what = "the particles never synced" if several else "there was no sync point"
        lower = "Each particle has learned from its own data alone; lower" if several else "Lower"
        text = (
            f"{what}: training had {session.step} steps, and swarm.sync_interval = {session.config.sync_interval}. "
            f"{lower} it, or end training with swarm.sync()"
        )
        if session.config.never_syncs:
            text = (
                'the particles never synced, as swarm.sync_interval = "never" says, and nothing has combined them; '
                "end training with swarm.search(score) or swarm.merge()"
            )
    if text is not None:
        warnings.warn(text, stacklevel=4)
