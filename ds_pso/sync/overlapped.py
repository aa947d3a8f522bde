"""Sync points in the background: begun after one step, and applied after later ones."""

from __future__ import annotations

import threading
import time
from typing import Any

from torch import Tensor

from ds_pso.comm.exchange import fill
from ds_pso.errors import SwarmError
from ds_pso.rules import SyncPoint
from ds_pso.shards import replace
from ds_pso.shards.fragments import Fragment
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.parts import Meetings
from ds_pso.sync.pending import Pending


class LateMeetings(Meetings):
    """Works on copies of the shards, in a thread, while the particle's own ranks go on training."""

    def begin(self, window: FitnessWindow, step: int, delay: int) -> None:
        """Meet the other particles in the background, and empty the window. Called alike on all ranks.

        Args:
            step: the optimizer step that has just been made.
            delay: ``advance`` will be called after each of so many following steps.

        Raises:
            SwarmError: as ``sync`` does.
        """
        assert self.pending is None, "finish what is pending first"
        self.shards.check_present()
        begin = time.perf_counter()
        self.schedule.begin(step)
        self._wait_for(self.world.layout.local_ranks)
        self.shards.zero_padding()
        numbers = list(range(self.fragments))
        if self.streaming:
            numbers = [(step // self.schedule.interval - 1) % self.fragments]
        row, losses = self._own_row(window), window.state()
        window.clear()
        pending = self.pending = Pending(step, delay, self.fragments, numbers, [], settled_s=self.world.settled_s)
        pending.movement, pending.window = [t.clone() for t in self._touched(pending)], losses
        pending.arrived = [threading.Event() for _ in range(pending.fragments)]
        pending.held_up_s = time.perf_counter() - begin
        self.world.in_background(lambda: self._meet(pending, row))

    def _meet(self, pending: Pending, row: list[float]) -> None:
        """What peers do together, on copies of the shards; the particle's own ranks are busy training."""
        begin, traffic = time.perf_counter(), self._traffic()
        waited = self._wait_for(self.world.layout.peers)
        point = self.assessor.of_all(row, self.schedule.progress(pending.begun))
        pending.pace = self._pace()
        # Whoever waits for the first fragment reads it.
        pending.record = self.assessor.record_of(point) | {"waited_s": waited}
        if self.streaming:
            pending.record |= {"fragment": pending.numbers[0], "abandoned": not all(point.alive)}
        if any(point.alive) and not pending.record.get("abandoned"):
            self.is_torn = True
            pending.record |= self._move(pending, point, begin)
            self.is_torn = False
        pending.record |= self._traffic_since(traffic)
        pending.background_s = time.perf_counter() - begin

    def _move(self, pending: Pending, point: SyncPoint, begin: float) -> dict[str, Any]:
        """Turn the copies into what ``Pending.movement`` says, one fragment after the other.

        Returns:
            What to log of it.
        """
        copies, buffers = self._split(pending)
        fill(buffers, self.exchange.weighted_mean(buffers, point.mean_weights()))
        memory = pending.numbers[0] if self.streaming else 0
        plan = self.rule.plan(point, self.memories[memory])
        if plan.score:
            raise SwarmError(
                "swarm.delay: the rule scores weights before it settles, and training has gone on meanwhile; let its "
                "uses_probe be true, so that this is told at once, or use 0",
                agreed=True,
            )
        note, squares = {}, []
        for fragment, own, arrived in zip(self._fragments_of(pending), copies, pending.arrived, strict=True):
            updater = self.updater.of(fragment)
            note = updater.displace(plan, own, alive=point.alive[self.exchange.particle])
            squares.append(updater.take_distance())
            pending.arrived_s.append(time.perf_counter() - begin)
            arrived.set()
        self.memories[memory] = plan.memory
        pending.lr_factors = plan.lr_factors
        pending.apart = self._apart(squares, point)
        return note

    def _fragments_of(self, pending: Pending) -> list[Fragment]:
        return [self._cut(pending.cut_into)[number] for number in pending.numbers]

    def _touched(self, pending: Pending) -> list[Tensor]:
        """What the sync point is about, in the order of ``Pending.movement``."""
        shards = self.shards.tensors
        ranges = [r.of(shards) for fragment in self._fragments_of(pending) for r in fragment]
        return [*ranges, *(buffer.reshape(-1) for _, buffer in self.shards.buffers())]

    def _split(self, pending: Pending) -> tuple[list[list[Tensor]], list[Tensor]]:
        """``Pending.movement``: of each fragment the tensors of its ranges; and those of the buffers."""
        tensors = iter(pending.movement)
        ranges = [[next(tensors) for _ in fragment] for fragment in self._fragments_of(pending)]
        return ranges, list(tensors)

    def advance(self, window: FitnessWindow, step: int, *, to_the_end: bool = False) -> dict[str, Any] | None:
        """Apply what is due of the meeting that was begun, and wait for it if need be. Called alike on all ranks.

        The correction of multi-step delayed updates: x <- result + (x now - x when it began).

        A particle that was not alive then takes everything as soon as something is due, and ``window`` forgets the
        losses since then, which were those of weights that are gone now.

        Args:
            to_the_end: also what is not due yet.

        Returns:
            What to log of it, once all is applied.

        Raises:
            As ``sync`` does.
        """
        self.shards.check_present()
        begin, pending = time.perf_counter(), self.pending
        assert pending is not None
        end = pending.fragments if to_the_end else pending.due_by(step)
        if end == 0:
            return None
        settled_before = self.world.settled_s
        if pending.arrived and end < pending.fragments:
            self.world.wait_for_task(pending.arrived[end - 1])
        else:
            self.world.settle()
        if pending.record.get("abandoned"):
            window.give_back(*pending.window)
            self.needs_whole = True
        elif pending.applied < end:
            self._apply(pending, end, window)
            self.shards.publish()
        pending.waited_s += self.world.settled_s - settled_before
        if end < pending.fragments:
            pending.held_up_s += time.perf_counter() - begin
            return None

        self.pending = None
        self.assessor.losses = tuple(pending.record["losses"])
        drift = self.assessor.drift(pending.apart)
        waited = self.world.settled_s - pending.settled_s
        # An evaluation or a checkpoint may have had to wait for it before.
        seconds = pending.held_up_s + waited - pending.waited_s + time.perf_counter() - begin
        overlapped = max(0.0, pending.background_s - waited)
        self.totals.overlapped_s += overlapped
        staleness, pace = step - pending.begun, (pending.pace[0], pending.pace[1])
        record = self._conclude(pending.record, pending.begun, drift, pace, staleness=staleness, seconds=seconds)
        if pending.fragments > 1:
            due = [min(step, pending.due(fragment)) - pending.begun for fragment in range(pending.fragments)]
            record |= {"fragments_staleness": due, "fragments_s": pending.arrived_s}
        return record | {"overlapped_s": overlapped}

    def _apply(self, pending: Pending, end: int, window: FitnessWindow) -> None:
        """Make the movement of the fragments before ``end``, and with the last one what is not theirs."""
        me, shards = self.exchange.particle, self.shards.tensors
        moved, mean = self._split(pending)
        alive = pending.record["alive"]
        if not alive[me]:
            # Half a particle would not live either.
            self.world.settle()
            end = pending.fragments
            window.clear_losses()
        if any(alive):
            fragments = self._fragments_of(pending)
            for number in range(pending.applied, end):
                for r, movement in zip(fragments[number], moved[number], strict=True):
                    if alive[me]:
                        r.of(shards).add_(movement)
                    else:
                        r.of(shards).copy_(movement)
        if any(alive) and end == pending.fragments:
            with self.shards.flat_buffers() as buffers:
                replace(buffers, mean)
            if pending.lr_factors:
                self.shards.lr_factor = pending.lr_factors[me]
                pending.record["lr_factors"] = pending.lr_factors
            if self.optimizer_state == "reset" or not alive[me]:
                self.shards.reset_optimizer_state()
        pending.applied = end
