"""A sync that waits for nobody: each particle sends its state to a peer, and uses the newest that has come."""

from __future__ import annotations

from ds_pso.distributed.mailbox import Mailbox
from ds_pso.rules import SyncPoint
from ds_pso.shards import replace
from ds_pso.sync.parts import SyncParts


class Gossip:
    """Sends and takes messages. Waits for no other particle, nor for a store: that may lie in a frozen process.

    Args:
        max_staleness: see ``Rule.max_staleness``.
    """

    def __init__(self, parts: SyncParts, mailbox: Mailbox, max_staleness: int) -> None:
        self._parts = parts
        self._mailbox = mailbox
        self._max_staleness = max_staleness
        self._bytes = 0

    def sync(self, point: SyncPoint) -> dict[str, object]:
        """Send this particle's state to a peer, each in turn, and follow the rule with what came meanwhile.

        Returns:
            Values to log: ``from``, the particle whose state was used, or None; and ``age``, how many syncs fewer it
            had behind it.
        """
        parts, mailbox = self._parts, self._mailbox
        me, others, local = parts.exchange.particle, parts.exchange.num_particles - 1, parts.world.local
        peer = (me + 1 + point.index % others) % (others + 1)
        with parts.shards.flat_buffers() as buffers:
            tensors = [*parts.shards.tensors, *buffers]
            # Whatever the ranks of a particle do with a message, they do together.
            busy = any(row[0] for row in local.gather([float(mailbox.busy(peer))]))
            if point.alive[me] and not busy:
                mailbox.send(tensors, point.index, peer)
            message = mailbox.newest()
            mine = [-1.0, -1.0] if message is None else [float(message.sender), float(message.index)]
            rows = local.gather(mine)
            received, self._bytes = mailbox.bytes_received - self._bytes, mailbox.bytes_received
            parts.exchange.traffic.bytes_received += received
            if message is None or any(row != mine for row in rows):
                return {"from": None}  # the same message will have come to all by the next sync, or a newer one
            mailbox.drop(message)
            if point.index - message.index > self._max_staleness:
                return {"from": None}
            values = message.flat.split([t.numel() for t in tensors])
            shards = parts.shards.tensors
            plan = parts.rule.plan(point, parts.memories[0])
            parts.updater.carry_out(plan, shards, values[: len(shards)])
            parts.memories[0] = plan.memory
            if not point.alive[me]:
                replace(buffers, values[len(shards) :])
                parts.shards.reset_optimizer_state()
        return {"from": message.sender, "age": point.index - message.index, **plan.note}
