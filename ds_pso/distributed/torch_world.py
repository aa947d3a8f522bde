"""torch's default process group of a particle: a script may use it, and end it, when its swarm is closed."""

from __future__ import annotations

import atexit

import torch.distributed as dist

_kept: tuple[object, dist.TCPStore | None] | None = None  # the group, and its store if this process hosts it


def keep(store: dist.TCPStore | None) -> None:
    """Leave the group to the script; what nobody has ended goes with the process, or when another swarm begins."""
    global _kept
    _kept = dist.group.WORLD, store


def is_in_use() -> bool:
    """End the group that an earlier swarm has left, and return whether there is another one."""
    global _kept
    left, _kept = _kept, None
    if left is not None and dist.is_initialized() and dist.group.WORLD is left[0]:
        dist.destroy_process_group()
    return dist.is_initialized()


atexit.register(is_in_use)
