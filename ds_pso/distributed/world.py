"""A rank's place in the swarm, as a whole of parts that do not know each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ds_pso.distributed import tcp_store, torch_world
from ds_pso.distributed.coordinator import LINGER_S, Coordinator
from ds_pso.distributed.layout import Layout, read_int
from ds_pso.distributed.local_group import LocalGroup
from ds_pso.distributed.mailbox import Mailbox
from ds_pso.distributed.membership import Membership
from ds_pso.distributed.particle_environment import ParticleEnvironment
from ds_pso.distributed.peer_group import PeerGroup
from ds_pso.errors import PeerError
from ds_pso.utils.background_task import Background

Value = TypeVar("Value")
_GOODBYE_S = 30.0  # how long the host of a store waits for its clients to leave


@dataclass
class World:
    """A rank's parts of the swarm. Built by ``carve``, by ``ds_pso.elastic`` or by a simulation.

    Attributes:
        layout: who this rank is.
        coordinator: what the ranks of this launch decide together.
        local: the ranks of this particle, talking inside it.
        peers: the process group of equal shards.
        membership: who takes part in a sync.
        background: the one job beside training.
        connect_mailbox: opens connections for messages that nobody waits for.
        environment: what describes the particle to DeepSpeed, until the world is left.
        owns_torch: whether torch's default world is of this particle alone.
    """

    layout: Layout
    coordinator: Coordinator
    local: LocalGroup
    membership: Membership
    connect_mailbox: Callable[[], Mailbox]
    peers: PeerGroup = field(default_factory=PeerGroup)
    background: Background = field(default_factory=Background)
    environment: ParticleEnvironment = field(default_factory=ParticleEnvironment)
    owns_torch: bool = True
    closed: bool = False
    _mailbox: Mailbox | None = None

    @property
    def is_leader(self) -> bool:
        """True on one rank of this launch: the one that prints and logs."""
        return self.coordinator.is_leader

    def gather(self, label: str, value: Value) -> list[Value]:
        """Return one small JSON value of every rank of this launch, in their order; call it on all of them."""
        return self.coordinator.gather(label, value)

    def open_mailbox(self) -> Mailbox:
        """Connect to the peers for messages; an earlier swarm's mailbox on this world is closed."""
        if self._mailbox is not None:
            self._mailbox.close()
        self._mailbox = self.connect_mailbox()
        return self._mailbox

    def confine(self) -> None:
        """Let barriers, values from all and agreement be among this particle's ranks, after peers were lost.

        Raises:
            PeerError: not all of them are here.
        """
        self.background.forget()
        coordinator, local_ranks = self.coordinator, self.layout.local_ranks
        if list(coordinator.ranks) == local_ranks:
            return
        patience_s = min(_GOODBYE_S, coordinator.timeout_s) + LINGER_S  # the leader may raise so much later than others
        try:
            address, port = os.environ["MASTER_ADDR"], read_int(os.environ, "MASTER_PORT")
            store = tcp_store.reach(address, port, timeout_s=patience_s)
        except (dist.DistError, RuntimeError) as error:
            who = coordinator.describe(self.layout.rank)
            raise PeerError(f"{who}: the first rank of its particle was lost") from error
        coordinator.confine(dist.PrefixStore("ds_pso/confined", store), patience_s)

    def close(self, steps: int = 0) -> None:
        """Leave in good order: nobody's store goes away while another still needs it.

        Args:
            steps: optimizer steps that this rank has taken, for those who wait for it in vain.
        """
        if self.closed:
            return
        with contextlib.suppress(dist.DistError, RuntimeError):
            self.coordinator.say_closed(steps)
        self.membership.close()
        try:
            self.background.settle()
        except BaseException:
            self.abandon()
            raise
        if self.owns_torch and dist.is_initialized():
            torch_world.keep(self.environment.take_store())
        self._close_mailbox()
        self.peers.shut()
        with contextlib.suppress(dist.DistError, RuntimeError):
            self.coordinator.leave(timedelta(seconds=min(_GOODBYE_S, self.coordinator.timeout_s)))
        self.abandon()

    def _close_mailbox(self) -> None:
        mailbox, self._mailbox = self._mailbox, None
        if mailbox is not None:
            mailbox.close()

    def abandon(self) -> None:
        """Leave at once, waiting for nobody, and put the launcher's environment back."""
        self.closed = True
        self.membership.close()
        self.membership.disconnect()
        self._close_mailbox()
        self.environment.restore()
        self.peers.group = None
        self.coordinator.disconnect()
