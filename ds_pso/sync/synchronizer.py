"""Sync points that training waits for: agree on fitness, plan, exchange, update, publish. And what is saved of all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ds_pso.comm.exchange import fill
from ds_pso.distributed.mailbox import Mailbox
from ds_pso.rules import SyncPoint
from ds_pso.shards import replace
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.overlapped import LateMeetings
from ds_pso.sync.parts import SyncTotals
from ds_pso.sync.pending import Pending


class Synchronizer(LateMeetings):
    """Knows the order of things at a sync point; leaves each of them to its own layer."""

    def sync(self, window: FitnessWindow, step: int) -> dict[str, Any]:
        """Meet the other particles, and empty the window. Called alike on all ranks.

        Args:
            step: the optimizer step that has just been made.

        Returns:
            What to log of it.

        Raises:
            PeerError: somebody did not come within the timeout; names who.
            SwarmError: the shards were offloaded, or the rule needs a loss and saw none.
        """
        assert self.pending is None, "finish what is pending first"
        self.shards.check_present()
        begin, traffic = time.perf_counter(), self._traffic()
        self.schedule.begin(step)
        self.needs_whole = False
        # Mates too: a frozen one would be waited for without a word inside the particle.
        waited = self._wait_for(self.world.layout.peers, together=True) if self._mailbox is None else 0.0
        self.shards.zero_padding()
        mine = self._own_row(window)
        count = self.assessor.of_all if self._mailbox is None else self.assessor.of_one
        point = count(mine, self.schedule.progress(step))
        note: dict[str, Any] = {}
        apart: Sequence[float] = (0.0, 0.0)
        if self._mailbox is not None:
            note = self._take_message(self._mailbox, point)
            apart = self.updater.take_distance()  # of this particle alone
        elif any(point.alive):
            self.is_torn = True
            note, apart = self._follow_rule(point)
            self.is_torn = False
        self._publish()
        window.clear()
        self.assessor.losses = point.fitness
        drift = self.assessor.drift(apart)
        record = self.assessor.record_of(point) | note | {"waited_s": waited, **self._traffic_since(traffic)}
        seconds = time.perf_counter() - begin
        return self._conclude(record, step, drift, self._pace(), staleness=0, seconds=seconds)

    def _follow_rule(self, point: SyncPoint) -> tuple[dict[str, Any], Sequence[float]]:
        """Carry out the rule's plans, one after the other; returns what to log of them, and what ``_apart`` says."""
        self._average_buffers(point)
        shards, note, distances = self.shards.tensors, dict[str, Any](), []
        parts = [(self.updater, shards)]
        if self.streaming:
            parts = [(self.updater.of(part), [r.of(shards) for r in part]) for part in self._cut(self.fragments)]
        for number, (updater, x) in enumerate(parts):
            plan = self.rule.plan(point, self.memories[number])
            note |= updater.carry_out(plan, x)
            while plan.score:
                self._publish(tentative=True)
                plan = self.rule.proceed(plan, self.assessor.score())
                note |= updater.carry_out(plan, x)
            updater.agree_on(x)
            self.memories[number] = plan.memory
            distances.append(updater.take_distance())
        if plan.lr_factors:
            self.shards.lr_factor = plan.lr_factors[self.exchange.particle]
            note["lr_factors"] = plan.lr_factors
        self._treat_optimizer_state(point)
        return note, self._apart(distances, point)

    def _take_message(self, mailbox: Mailbox, point: SyncPoint) -> dict[str, Any]:
        """Send the particle's state to a peer, and use what came meanwhile.

        Waits for no other particle, nor for the store: that may lie in a process that is frozen or gone.
        """
        me, shards = self.exchange.particle, self.shards.tensors
        others = self.exchange.num_particles - 1
        peer = (me + 1 + point.index % others) % (others + 1)  # each in turn
        with self.shards.flat_buffers() as buffers:
            tensors = [*shards, *buffers]
            # Whatever the ranks of a particle do with a message, they do together.
            busy = any(row[0] for row in self.world.particle_gather([float(mailbox.busy(peer))]))
            if point.alive[me] and not busy:
                mailbox.send(tensors, point.index, peer)
            message = mailbox.newest()
            mine = [-1.0, -1.0] if message is None else [float(message.sender), float(message.index)]
            rows = self.world.particle_gather(mine)
            self.exchange.bytes_received += mailbox.bytes_received - self._message_bytes
            self._message_bytes = mailbox.bytes_received
            if message is None or any(row != mine for row in rows):
                return {"from": None}  # the same message will have come to all by the next sync point, or a newer one
            mailbox.drop(message)
            assert self.rule.max_staleness is not None
            if point.index - message.index > self.rule.max_staleness:
                return {"from": None}
            parts = message.flat.split([t.numel() for t in tensors])
            plan = self.rule.plan(point, self.memories[0])
            self.updater.carry_out(plan, shards, parts[: len(shards)])
            self.memories[0] = plan.memory
            if not point.alive[me]:
                replace(buffers, parts[len(shards) :])
                self.shards.reset_optimizer_state()
        return {"from": message.sender, "age": point.index - message.index, **plan.note}

    def _treat_optimizer_state(self, point: SyncPoint) -> None:
        if self.optimizer_state == "average":
            self._average_moments(point)
        elif self.optimizer_state == "reset" or not point.alive[self.exchange.particle]:
            self._reset_optimizer_state()

    def _average_moments(self, point: SyncPoint) -> None:
        """The moments of every particle, the dead included, become the mean of those of the living."""
        moments = self.shards.moments()
        counts = self.exchange.all_gather([float(len(moments))])
        alike = len({counts[particle][0] for particle in self.exchange.present}) == 1  # peers, not local ranks
        if not all(row[0] for row in self.world.particle_gather([float(alike)])):
            # A particle whose every step was skipped has none yet.
            if not point.alive[self.exchange.particle]:
                self._reset_optimizer_state()
            return
        fill(moments, self.exchange.weighted_mean(moments, point.mean_weights()))
        self._stay_together()
        self.shards.publish_moments()

    def _average_buffers(self, point: SyncPoint) -> None:
        """Statistics are no parameters: whatever the rule, they become the mean of the living."""
        with self.shards.flat_buffers() as buffers:
            fill(buffers, self.exchange.weighted_mean(buffers, point.mean_weights()))

    def state_dict(self) -> dict[str, Any]:
        """What is equal on all ranks of a particle, or small; JSON values."""
        return {
            "rule_memories": self.memories,
            "lr_factor": self.shards.lr_factor,
            "last_losses": self.assessor.losses,
            "highest_loss": self.assessor.highest_loss,
            "norm_limit": self.assessor.limits.norm,  # for who reads the checkpoint without a swarm
            "totals": asdict(self.totals),
            "schedule": self.schedule.state_dict(),
            "held_up_s": self._held_up_s,
            "step_s": self.assessor.step_s,
            "pending": None if self.pending is None else self.pending.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], movement: Sequence[Tensor] = ()) -> None:
        """``movement``: of the meeting that was pending, if there was one."""
        self.pending = None
        if state["pending"]:
            pending = self.pending = Pending(movement=[], settled_s=self.world.settled_s, **state["pending"])
            pending.movement = [values.to(t) for t, values in zip(self._touched(pending), movement, strict=True)]
        self.memories = list(state["rule_memories"])
        self.shards.lr_factor = state["lr_factor"]
        self.assessor.losses = tuple(state["last_losses"])
        self.assessor.highest_loss = state.get("highest_loss", math.nan)  # of an older ds_pso there is none
        self.totals = SyncTotals(**state["totals"])
        self.assessor.index = self.totals.count
        self.schedule.load_state_dict(state["schedule"])
        self._held_up_s, self.assessor.step_s = state["held_up_s"], state["step_s"]
