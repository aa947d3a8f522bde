"""The world of a particle that is a job of its own: its ranks know each other, and find other particles as they come.

Two stores: that of the job, which lives as long as the particle, and in each quorum that of one of its members.
Whatever breaks between particles is a ``PeerError``, after which the ranks of the particle come back together.
"""

from __future__ import annotations

import os
from typing import Literal, cast

from ds_pso.distributed import tcp_store, torch_world
from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.distributed.mailbox import Mailbox
from ds_pso.distributed.particle_environment import ParticleEnvironment
from ds_pso.distributed.peer_group import PeerGroup
from ds_pso.distributed.static_world import join_launch
from ds_pso.distributed.transports import TransportOptions
from ds_pso.distributed.world import World
from ds_pso.elastic.config import ElasticConfig
from ds_pso.elastic.connections import CONNECT_S
from ds_pso.elastic.launch_env import read_launch
from ds_pso.elastic.local_group import StoreLocalGroup
from ds_pso.elastic.membership import ElasticMembership
from ds_pso.errors import ConfigError
from ds_pso.utils.background_task import Background


def build(particles: int | Literal["node"], options: TransportOptions) -> World:
    """Build the world of the transport "elastic"."""
    return join(particles, cast(ElasticConfig, options.elastic), options.timeout_s)


def join(particles: int | Literal["node"], options: ElasticConfig, timeout_s: float) -> World:
    """Build the particle's own world. Call it where ``carve`` would be called.

    Raises:
        ConfigError: not started by ``ds-pso launch``, or what that says does not fit.
        PeerError: a rank of this particle did not come within ``timeout_s``.
    """
    launch = read_launch(particles, os.environ)
    layout = launch.layout
    if options.min_particles > layout.num_particles:
        raise ConfigError(
            f"swarm.elastic.min_particles = {options.min_particles}: there are "
            f"{layout.num_particles} places; use at most as many"
        )
    environment, background, owns_torch = ParticleEnvironment(), Background(), not torch_world.is_in_use()
    if "MASTER_ADDR" not in os.environ:
        environment.describe_lone_rank(layout)
    try:
        coordinator = StoreCoordinator(layout, timeout_s, background, layout.local_ranks)
        join_launch(coordinator)
        patience_s = 3 * timeout_s + 2 * CONNECT_S + options.straggler_s + 2 * options.heartbeat_s
        local, peers = StoreLocalGroup(coordinator, patience_s), PeerGroup()
        own_store = tcp_store.host_at(launch.host) if coordinator.is_leader else None
        membership = ElasticMembership(launch, options, coordinator, local, peers, own_store)
    except BaseException:
        environment.restore()
        raise
    return World(layout, coordinator, local, membership, _no_mailbox, peers, background, environment, owns_torch)


def _no_mailbox() -> Mailbox:
    raise ConfigError(
        'swarm.transport = "elastic": messages are not sent; set asynchronous to false, and '
        'swarm.elastic.straggler to "async" or "skip"'
    )
