"""Sync points of particles that come and go: who is there meets, who is behind is given the state; all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_pso.comm.exchange import Exchange, fill
from ds_pso.elastic.quorum import Meeting
from ds_pso.elastic.world import ElasticWorld
from ds_pso.errors import PeerError
from ds_pso.rules import Rule
from ds_pso.shards import Shards
from ds_pso.sync.consensus import Choice, Consensus
from ds_pso.sync.fitness import FitnessWindow
from ds_pso.sync.pending import Pending
from ds_pso.sync.rollback import Progress, Undo, at_another_step, common_tensors, owed
from ds_pso.sync.synchronizer import Synchronizer

_ATTEMPTS = 20  # each without somebody who was lost in the one before
_PAUSE_S = 0.2


class ElasticSynchronizer(Synchronizer):
    """As ``Synchronizer``; begins by joining the swarm, which may be running already.

    Args:
        window: of losses, which a particle that joins empties.
        progress: what the engine and the samplers count.
        section: the resolved ``swarm`` section, which must be equal on all particles.
        rest: see ``Meetings``.
    """

    world: ElasticWorld

    def __init__(
        self,
        world: ElasticWorld,
        exchange: Exchange,
        rule: Rule,
        shards: Shards,
        *,
        window: FitnessWindow,
        progress: Progress,
        section: Mapping[str, Any],
        **rest: Any,
    ) -> None:
        self.progress = progress
        # Who came late has state of a running swarm, and needs no checkpoint.
        self.came_late = False
        self.joined = False  # see ``Member``
        self._fresh = True
        # How far the giver is, and whether the moments are to begin anew: to be done when all have got through.
        self._told: Mapping[str, Any] | None = None
        self._resets = False
        self._last, self._met = "", 0  # meeting that it has been through, and how many were there
        self._meeting: Meeting | None = None
        self._waited_s = 0.0
        text = json.dumps([shards.fingerprint(), world.layout.particle_size, world.layout.num_particles, dict(section)])
        self._model = hashlib.sha256(text.encode()).hexdigest()[:16]
        super().__init__(world, exchange, rule, shards, **rest)
        self.consensus = _OwnModel(self.assessor, self.updater, shards)
        self.sync(window, progress.engine.global_steps)

    def _check_same_model(self) -> None:
        """The fingerprint goes with every question who is there."""

    def _start_alike(self) -> None:
        """By joining."""
        self.shards.zero_padding()

    def step_made(self) -> None:
        super().step_made()
        self.world.sign_of_life()

    # -- sync points that training waits for ------------------------------------------------

    def sync(self, window: FitnessWindow, step: int) -> dict[str, Any]:
        """As ``Synchronizer.sync``; if somebody is lost meanwhile, those who are left meet again.

        Raises:
            PeerError: too few particles are left, or this one's place has been taken.
        """
        for _ in range(_ATTEMPTS):
            undo = Undo(self._all_tensors(), window, self.state_dict())
            try:
                return self._sync_once(window, step)
            except PeerError as error:
                if error.agreed:
                    raise
                self._retreat(error, undo)
        raise PeerError(
            f"particle {self.exchange.particle}: {_ATTEMPTS} attempts to meet have failed, each because a particle was "
            "lost meanwhile; look at the network and at the logs of the others",
            agreed=True,
        )

    def _sync_once(self, window: FitnessWindow, step: int) -> dict[str, Any]:
        meeting = self._assemble(in_background=False)
        while meeting.is_mixed:  # the others have been told by it that somebody waits
            time.sleep(_PAUSE_S)
            meeting = self._assemble(in_background=False)
        self._told, self._resets = None, False
        self._heal(meeting, window)
        if meeting.is_start:
            self._publish()
            self._fresh = False
            return {}
        record = super().sync(window, self._told["engine"]["global_steps"] if self._told else step)
        self._fresh = False
        return record | {"present": meeting.present, "healed": meeting.behind}

    def _assemble(self, *, in_background: bool) -> Meeting:
        begin = time.perf_counter()
        self._meeting = self.world.assemble(
            index=self.assessor.index,
            last=self._last,
            met=self._met,
            fresh=self._fresh,
            in_background=in_background,
            joined=self.joined,
            model=self._model,
        )
        self._waited_s = time.perf_counter() - begin
        self._stay_together()  # one of them may not have reached its peers
        return self._meeting

    @property
    def _is_behind(self) -> bool:
        """Whether this particle's own numbers must not count at the present meeting."""
        return self._meeting is not None and self.exchange.particle in self._meeting.behind

    def _heal(self, meeting: Meeting, window: FitnessWindow) -> None:
        """Give who is behind the state of one who is not, shard by shard; and who is late the numbers alone."""
        if not meeting.behind and not meeting.overdue:
            return
        me, sources = self.exchange.particle, meeting.sources(self.exchange.num_particles)
        first = meeting.givers[0]
        if self.world.is_leader and (me == first or me in [sources[particle] for particle in meeting.behind]):
            self.world.tell(meeting, f"state/{me}", {"sync": self.state_dict(), "progress": self.progress.read()})
        if meeting.behind:
            with self.shards.flat_buffers() as buffers:
                tensors = [*self.shards.tensors, *self.shards.frozen(), *buffers, *common_tensors(self.updater)]
                fill(tensors, self.exchange.from_each(tensors, sources))
        if me in meeting.overdue:
            told = self.world.hear(meeting, f"state/{first}")
            steps = told["progress"]["engine"]["global_steps"], self.progress.engine.global_steps
            schedule = at_another_step(told["sync"]["schedule"], *steps)
            self._take_numbers({**told["sync"], "schedule": schedule}, lr_factor=self.shards.lr_factor)
        if me in meeting.behind:
            told = self.world.hear(meeting, f"state/{sources[me]}")
            self._take_numbers(told["sync"], lr_factor=1.0)
            # At a start all are as far, each as its own script has it.
            self._told = None if meeting.is_start else told["progress"]
            for tensor in owed(self.updater):
                tensor.zero_()
            window.clear()

    def _take_numbers(self, told: Mapping[str, Any], *, lr_factor: float) -> None:
        """Of the rule, the schedule and the count of sync points; what they have cost stays this rank's own."""
        totals = self.state_dict()["totals"] | {"count": told["totals"]["count"]}
        self.load_state_dict({**told, "totals": totals, "lr_factor": lr_factor, "pending": None})

    def _own_row(self, window: FitnessWindow) -> list[float]:
        if self._is_behind:
            return self.assessor.row_of_a_stranger()
        return super()._own_row(window)

    def _wait_for(self, ranks: Sequence[int], *, together: bool = False) -> float:
        """They are here already."""
        return self._waited_s

    def _stay_together(self) -> None:
        self.world.particle_gather([])

    def _publish(self, *, tentative: bool = False) -> None:
        if tentative:
            self._stay_together()
        else:
            self._vote()
        super()._publish(tentative=tentative)

    def _vote(self) -> None:
        """All who met have got through, or nobody keeps what has come.

        Who is lost in the very moment of voting may leave some with a yes and others with a no: these are behind then.

        Raises:
            PeerError: somebody has not.
        """
        self.exchange.all_gather([1.0])  # of each shard's peers; that they come is their vote
        self._stay_together()
        assert self._meeting is not None
        self._last, self._met = self._meeting.number, len(self._meeting.members)
        # Whoever was there at the start alone knows no more than it may have on its disk.
        self.joined = self.joined or not self._meeting.is_start
        told, self._told = self._told, None
        if told is not None or self._resets:
            super()._reset_optimizer_state()
            self._resets = False
        if told is not None:
            self.progress.write(told)
            self.came_late = self.came_late or (self._fresh and not self._meeting.is_start)

    def _reset_optimizer_state(self) -> None:
        self._resets = True

    def _all_tensors(self) -> list[Tensor]:
        moments = self.shards.moments() if self.optimizer_state == "average" else []
        buffers = [buffer for _, buffer in self.shards.buffers()]
        return [*self.shards.tensors, *buffers, *moments, *common_tensors(self.updater), *owed(self.updater)]

    def _retreat(self, error: PeerError, undo: Undo) -> None:
        self.world.retreat(error)
        undo.put_back()
        self.updater.take_distance()
        self.load_state_dict(undo.numbers)
        self.is_torn = False
        if self.world.is_leader:
            warnings.warn(f"sync point {self.assessor.index} was broken off: {error}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last_meeting": [self._last, self._met]}

    def load_state_dict(self, state: Mapping[str, Any], movement: Sequence[Tensor] = ()) -> None:
        super().load_state_dict(state, movement)
        # A checkpoint of a static swarm has none, on all particles alike.
        self._last, self._met = state.get("last_meeting", ["", 0])

    # -- in the background ------------------------------------------------------------------

    def begin(self, window: FitnessWindow, step: int, delay: int) -> None:
        self._meeting = None
        self._stay_together()
        super().begin(window, step, delay)

    def _meet(self, pending: Pending, row: list[float]) -> None:
        """As ``LateMeetings._meet``; where somebody is lost, or needs the whole model, nothing comes of it."""
        traffic = self._traffic()
        memories, step_s, highest = list(self.memories), self.assessor.step_s, self.assessor.highest_loss
        undo = Undo([*common_tensors(self.updater), *owed(self.updater)], FitnessWindow(), {})
        try:
            meeting = self._assemble(in_background=True)
            if meeting.behind or meeting.overdue or meeting.is_mixed:
                self._break_off(pending, traffic)
                return
            super()._meet(pending, row)
            pending.record |= {"present": meeting.present, "healed": ()}
            self._vote()
        except PeerError as error:
            if error.agreed:
                raise
            self.world.retreat(error)
            undo.put_back()
            self.memories, self.is_torn = memories, False
            self.assessor.step_s, self.assessor.highest_loss = step_s, highest
            self._break_off(pending, traffic)

    def _break_off(self, pending: Pending, traffic: tuple[int, float, int]) -> None:
        """All meet for the whole model after this."""
        alive = [particle in self.exchange.present for particle in range(self.exchange.num_particles)]
        pending.record = {
            "sync": self.assessor.index,
            "losses": self.assessor.losses,
            "alive": alive,
            "abandoned": True,
        }
        pending.record |= {"waited_s": self._waited_s, **self._traffic_since(traffic)}
        # Some ranks may have seen more of it than others: the schedule learns nothing from it.
        pending.apart, pending.pace, pending.lr_factors = (0.0, 0.0), (math.nan, 0.0), ()

    def _conclude(
        self, record: dict[str, Any], *arguments: Any, staleness: int, seconds: float, **more: Any
    ) -> dict[str, Any]:
        count = self.totals.count
        if staleness == 0:  # training waited for the others
            seconds += self._waited_s
        record = super()._conclude(record, *arguments, staleness=staleness, seconds=seconds, **more)
        if record.get("abandoned"):  # others may have got through: then this particle is behind
            self.totals.count = self.assessor.index = count
        return record


class _OwnModel(Consensus):
    """Between sync points a particle has only its own to show."""

    def collect(self, which: Choice) -> tuple[list[Tensor], list[Tensor]]:
        self.assessor.world.settle()  # a meeting in the background works on the rule's state
        self.shards.zero_padding()
        models, model_in = self.shards.tensors, self.updater.rule.model_in
        if which == "consensus" and model_in != "x":
            models = [state[model_in] for state in self.updater.state]
        return [t.clone() for t in models], [b.reshape(-1).clone() for _, b in self.shards.buffers()]
