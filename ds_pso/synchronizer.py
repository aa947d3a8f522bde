"""What happens at a sync point: agree on fitness, plan, exchange, update, publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from ds_pso.census import Census, Probe
from ds_pso.consensus import Consensus
from ds_pso.errors import SwarmError
from ds_pso.exchange import Exchange, fill
from ds_pso.fitness import FitnessWindow
from ds_pso.fragments import Fragment, cut
from ds_pso.keeping import AS_IT_COMES, Keeping
from ds_pso.letters import Mailbox
from ds_pso.pending import Pending
from ds_pso.rules import Rule, SyncPoint
from ds_pso.schedule import Observed, Schedule
from ds_pso.shards import Shards, replace
from ds_pso.step_clock import StepClock
from ds_pso.updater import Updater
from ds_pso.wire import FORMATS, Differences
from ds_pso.world import World


@dataclass
class SyncTotals:
    """What the sync points have cost this rank so far."""

    count: int = 0
    seconds: float = 0.0  # wall time, waiting for peers included
    waited_s: float = 0.0  # until the last peer arrived
    overlapped_s: float = 0.0  # in the background, while training went on
    bytes_received: int = 0


class Synchronizer:
    """Knows the order of things at a sync point; leaves each of them to its own layer.

    Args:
        probe, rank_by: see ``Census``.
        schedule: decides when ``sync`` or ``begin`` is to be called, and is told what came of it.
        optimizer_state: what becomes of the optimizer's moments at a sync point.
        wire: how weights travel.
        fragments: into how many pieces a delayed sync point is cut.
        streaming: whether each of them meets by itself, in its turn.
        keeping: where state lies, and in how many bits.
    """

    def __init__(
        self,
        world: World,
        exchange: Exchange,
        rule: Rule,
        shards: Shards,
        *,
        probe: Probe | None = None,
        rank_by: Literal["train", "probe"] = "train",
        schedule: Schedule,
        optimizer_state: Literal["keep", "average", "reset"] = "keep",
        wire: Literal["fp32", "bf16", "int8", "int4"] = "fp32",
        fragments: int = 1,
        streaming: bool = False,
        keeping: Keeping = AS_IT_COMES,
    ) -> None:
        self.world = world
        self.exchange = exchange
        self.rule = rule
        self.shards = shards
        self.optimizer_state = optimizer_state
        self.fragments = fragments
        self.streaming = streaming
        self.totals = SyncTotals()
        self.schedule = schedule
        self.census = Census(world, exchange, shards, probe=probe, rank_by=rank_by, total=schedule.count)
        self._check_same_model()
        self._start_alike()
        differences = None if wire == "fp32" else Differences(FORMATS[wire], shards.tensors, keeping)
        state = [
            {name: keeping.keep(value, rough=name in rule.rough_state) for name, value in found.items()}
            for found in (rule.init_state(keeping.near(x)) for x in shards.tensors)
        ]
        self.updater = Updater(exchange, rule, shards.segments, state, differences)
        # Of the rule: numbers that are equal on all ranks; of each fragment if they meet by themselves.
        self.memories: list[Mapping[str, Any]] = [{}] * (fragments if streaming else 1)
        self.consensus = Consensus(self.census, self.updater, shards)
        self.pending: Pending | None = None
        # A fragment did not meet in its turn: a particle that is not alive needs the whole model, so ``sync`` is next.
        self.needs_whole = False
        self._cuts: dict[int, list[Fragment]] = {}
        self._mailbox = world.open_mailbox() if rule.max_staleness is not None else None
        self._letter_bytes = 0
        self.clock = StepClock()
        self._held_up_s = 0.0  # by the last sync point

    def _check_same_model(self) -> None:
        prints = self.world.gather("the model of every particle", self.shards.fingerprint())
        size = self.world.layout.particle_size
        for rank, other in enumerate(prints):
            if other != prints[rank % size]:
                raise SwarmError(
                    f"the model of {self.world.describe(rank)} is not that of particle 0 (names, shapes, dtypes or "
                    "ZeRO partitioning differ); build the same model with the same config on every rank",
                    agreed=True,
                )

    def _start_alike(self) -> None:
        """Give every particle the weights of particle 0, whatever its random seed was."""
        self.shards.zero_padding()
        for tensors in (self.shards.tensors, self.shards.frozen()):
            fill(tensors, self.exchange.from_one(tensors, source=0))
        with self.shards.flat_buffers() as buffers:
            fill(buffers, self.exchange.from_one(buffers, source=0))
        self.shards.publish()

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
        layout = self.world.layout  # mates too: a frozen one would be waited for without a word inside the particle
        waited = self._wait_for(layout.peers, layout.mates) if self._mailbox is None else 0.0
        self.shards.zero_padding()
        mine = self._own_row(window)
        count = self.census.of_all if self._mailbox is None else self.census.of_one
        point = count(mine, self.schedule.progress(step))
        note: dict[str, Any] = {}
        apart: Sequence[float] = (0.0, 0.0)
        if self._mailbox is not None:
            note = self._take_letter(self._mailbox, point)
            apart = self.updater.take_distance()  # of this particle alone
        elif any(point.alive):
            note, apart = self._follow_rule(point)
        self.shards.publish()
        window.clear()
        self.census.losses = point.fitness
        drift = self.census.drift(apart)
        record: dict[str, Any] = {"sync": point.index, "losses": point.fitness, "alive": point.alive, **note}
        record |= {"waited_s": waited, **self._traffic_since(traffic)}
        seconds = time.perf_counter() - begin
        return self._conclude(record, step, drift, self._pace(), staleness=0, seconds=seconds)

    def _pace(self) -> tuple[float, float]:
        return self.census.step_s, self.census.held_up_s

    def _conclude(
        self,
        record: dict[str, Any],
        begun: int,
        drift: float,
        pace: tuple[float, float],
        *,
        staleness: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Count the sync point, and let the schedule know what it was like; returns the whole record."""
        self.totals.count += 1
        self.census.index = self.totals.count
        self._held_up_s = seconds
        self.totals.seconds += seconds
        self.totals.waited_s += record["waited_s"]
        self.totals.bytes_received += record["bytes_received"]
        self.schedule.observe(Observed(drift, *pace))
        interval = self.schedule.next_after(begun) - begun
        times = {"seconds": seconds, "step_s": pace[0]}
        return record | {"drift": drift, "staleness": staleness, "next_interval": interval, **times}

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
        self._wait_for(self.world.layout.mates)
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
        point = self.census.of_all(row, self.schedule.progress(pending.begun))
        pending.pace = self._pace()
        # Whoever waits for the first fragment reads it.
        pending.record = {"sync": point.index, "losses": point.fitness, "alive": point.alive, "waited_s": waited}
        if self.streaming:
            pending.record |= {"fragment": pending.numbers[0], "abandoned": not all(point.alive)}
        if any(point.alive) and not pending.record.get("abandoned"):
            pending.record |= self._move(pending, point, begin)
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

    def _cut(self, count: int) -> list[Fragment]:
        if count not in self._cuts:
            self._cuts[count] = cut(self.shards, count)
        return self._cuts[count]

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
        self.census.losses = tuple(pending.record["losses"])
        drift = self.census.drift(pending.apart)
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

    def _own_row(self, window: FitnessWindow) -> list[float]:
        return self.census.own_row(
            window, step_s=self.clock.take(), held_up_s=self._held_up_s, needs_loss=self.rule.uses_fitness
        )

    def _apart(self, distances: Sequence[Sequence[float]], point: SyncPoint) -> Sequence[float]:
        """See ``Census.apart``; ``distances``: of each part of this rank's elements."""
        return self.census.apart([sum(column) for column in zip(*distances, strict=True)], point)

    def _traffic(self) -> tuple[int, float]:
        return self.exchange.bytes_received, self.exchange.seconds

    def _traffic_since(self, before: tuple[int, float]) -> dict[str, Any]:
        received, seconds = (now - then for now, then in zip(self._traffic(), before, strict=True))
        bandwidth = received * 8 / seconds / 1e6 if seconds > 0 else None
        return {"bytes_received": int(received), "exchange_s": seconds, "bandwidth_mbit_s": bandwidth}

    def _wait_for(self, *groups: Sequence[int]) -> float:
        """Roll call; returns its seconds."""
        begin, turn = time.perf_counter(), self.world.turn("sync")
        self.world.roll_call(f"sync {turn}", sorted({rank for ranks in groups for rank in ranks}))
        if turn > 1:  # the last one may have been of others
            self.world.forget(f"sync {turn - 2}")
        return time.perf_counter() - begin

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
                self.shards.publish()
                plan = self.rule.proceed(plan, self.census.score())
                note |= updater.carry_out(plan, x)
            updater.agree_on(x)
            self.memories[number] = plan.memory
            distances.append(updater.take_distance())
        if plan.lr_factors:
            self.shards.lr_factor = plan.lr_factors[self.exchange.particle]
            note["lr_factors"] = plan.lr_factors
        self._treat_optimizer_state(point)
        return note, self._apart(distances, point)

    def _take_letter(self, mailbox: Mailbox, point: SyncPoint) -> dict[str, Any]:
        """Send the particle's state to a peer, and use what came meanwhile.

        Waits for no other particle, nor for the store: that may lie in a process that is frozen or gone.
        """
        me, shards = self.exchange.particle, self.shards.tensors
        others = self.exchange.num_particles - 1
        peer = (me + 1 + point.index % others) % (others + 1)  # each in turn
        with self.shards.flat_buffers() as buffers:
            tensors = [*shards, *buffers]
            # Whatever the ranks of a particle do with a letter, they do together.
            busy = any(row[0] for row in self.world.particle_gather([float(mailbox.busy(peer))]))
            if point.alive[me] and not busy:
                mailbox.send(tensors, point.index, peer)
            letter = mailbox.newest()
            mine = [-1.0, -1.0] if letter is None else [float(letter.sender), float(letter.index)]
            rows = self.world.particle_gather(mine)
            self.exchange.bytes_received += mailbox.bytes_received - self._letter_bytes
            self._letter_bytes = mailbox.bytes_received
            if letter is None or any(row != mine for row in rows):
                return {"from": None}  # the same letter will have come to all by the next sync point, or a newer one
            mailbox.drop(letter)
            assert self.rule.max_staleness is not None
            if point.index - letter.index > self.rule.max_staleness:
                return {"from": None}
            parts = letter.flat.split([t.numel() for t in tensors])
            plan = self.rule.plan(point, self.memories[0])
            self.updater.carry_out(plan, shards, parts[: len(shards)])
            self.memories[0] = plan.memory
            if not point.alive[me]:
                replace(buffers, parts[len(shards) :])
                self.shards.reset_optimizer_state()
        return {"from": letter.sender, "age": point.index - letter.index, **plan.note}

    def _treat_optimizer_state(self, point: SyncPoint) -> None:
        if self.optimizer_state == "average":
            self._average_moments(point)
        elif self.optimizer_state == "reset" or not point.alive[self.exchange.particle]:
            self.shards.reset_optimizer_state()

    def _average_moments(self, point: SyncPoint) -> None:
        """The moments of every particle, the dead included, become the mean of those of the living."""
        moments = self.shards.moments()
        alike = len({row[0] for row in self.exchange.all_gather([float(len(moments))])}) == 1  # peers, not mates
        if not all(row[0] for row in self.world.particle_gather([float(alike)])):
            # A particle whose every step was skipped has none yet.
            if not point.alive[self.exchange.particle]:
                self.shards.reset_optimizer_state()
            return
        fill(moments, self.exchange.weighted_mean(moments, point.mean_weights()))
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
            "last_losses": self.census.losses,
            "totals": asdict(self.totals),
            "schedule": self.schedule.state_dict(),
            "held_up_s": self._held_up_s,
            "step_s": self.census.step_s,
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
        self.census.losses = tuple(state["last_losses"])
        self.totals = SyncTotals(**state["totals"])
        self.census.index = self.totals.count
        self.schedule.load_state_dict(state["schedule"])
        self._held_up_s, self.census.step_s = state["held_up_s"], state["step_s"]
