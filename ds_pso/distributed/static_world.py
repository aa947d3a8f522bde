"""Carves the launcher's world of W ranks into P particles of S ranks, and joins equal shards.

After ``carve`` the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) describes the particle,
so that DeepSpeed, Accelerate and the HF Trainer build an ordinary world of S ranks inside it.
Rank i of every particle belongs to the peer group of shard i, a process group of its own that
torch's default world knows nothing about.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from ds_pso.distributed import tcp_store, torch_world
from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.distributed.layout import Layout, read_int, read_layout
from ds_pso.distributed.local_group import TorchLocalGroup
from ds_pso.distributed.mailbox import GlooMailbox, Mailbox
from ds_pso.distributed.membership import StaticMembership
from ds_pso.distributed.particle_environment import ParticleEnvironment
from ds_pso.distributed.peer_group import PeerGroup, connect_peers, connecting
from ds_pso.distributed.transports import TransportOptions
from ds_pso.distributed.world import World
from ds_pso.errors import ConfigError, PeerError
from ds_pso.utils.background_task import Background

# One connection for the life of the process: a rank that joins a second swarm must not find a store
# that rank 0 is about to close.
_launcher_stores: dict[tuple[str, int], dist.TCPStore] = {}
_joined = 0  # how many swarms this process has been in; equal on all ranks


def build(particles: int | Literal["node"], options: TransportOptions) -> World:
    """Build the world of the transport "static"."""
    return carve(particles, peer_backend=options.peer_backend, timeout_s=options.timeout_s)


def carve(particles: int | Literal["node"], *, peer_backend: str = "auto", timeout_s: float = 600.0) -> World:
    """Split the launcher's world and point the environment at this rank's particle.

    Call it before ``deepspeed.init_distributed``, ``Accelerator()`` or ``TrainingArguments()``.

    Raises:
        ConfigError: P does not divide W, no launcher, or torch.distributed is already up.
        PeerError: some ranks did not arrive within ``timeout_s``; it names them.
    """
    layout = read_layout(particles, os.environ)
    torch_was_up = torch_world.is_in_use()
    if layout.num_particles > 1 and torch_was_up:
        raise ConfigError(
            "torch.distributed is already initialised; call ds_pso.init before "
            "deepspeed.init_distributed, Accelerator() or TrainingArguments()"
        )
    world, coordinator = unconnected(layout, timeout_s)
    world.owns_torch = not torch_was_up
    if "RANK" not in os.environ and not torch_was_up:
        world.environment.describe_lone_rank(layout)
    if layout.world_size > 1:
        try:
            join_launch(coordinator)
            if layout.num_particles > 1:
                world.peers = _connect_peers(coordinator, peer_backend)
                _enter_particle(coordinator, world.environment)
        except BaseException:
            world.abandon()
            raise
    return world


def unconnected(layout: Layout, timeout_s: float) -> tuple[World, StoreCoordinator]:
    """Make the world of a rank that knows nobody yet, and its coordinator."""
    background = Background()
    coordinator = StoreCoordinator(layout, timeout_s, background)
    membership = StaticMembership(layout, coordinator)
    world = World(
        layout,
        coordinator,
        TorchLocalGroup(layout),
        membership,
        lambda: _connect_mailbox(coordinator),
        background=background,
    )
    return world, coordinator


def join_launch(coordinator: StoreCoordinator) -> None:
    """Open the store of the launcher's world; every rank says hello."""
    global _joined
    address, port = os.environ["MASTER_ADDR"], read_int(os.environ, "MASTER_PORT")
    agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _launcher_stores.get((address, port))
    if store is None:
        hosts_store = coordinator.is_leader and not agent_hosts_store
        store = _launcher_stores[address, port] = _open_launcher_store(coordinator, address, port, hosts_store)
    # The store may hold the keys of an earlier attempt of torchrun, or of an earlier swarm of this job.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _joined += 1
    coordinator.open(dist.PrefixStore(f"ds_pso/{attempt}/{_joined}", store))


def _open_launcher_store(coordinator: StoreCoordinator, address: str, port: int, hosts_store: bool) -> dist.TCPStore:
    timeout_s, rank = coordinator.timeout_s, coordinator.layout.rank
    try:
        return (tcp_store.host if hosts_store else tcp_store.reach)(address, port, timeout_s=timeout_s)
    except (dist.DistError, RuntimeError) as error:
        what = (
            f"rank 0 cannot listen on port {port}; another job may use it: choose another with --master_port"
            if hosts_store
            else f"rank {rank} could not reach rank 0 at {address}:{port} within {timeout_s:g} s; "
            "check that every node was started and that MASTER_ADDR and MASTER_PORT are right"
        )
        raise PeerError(f"{what} ({str(error).splitlines()[0]})") from error


def _connect_peers(coordinator: StoreCoordinator, backend: str) -> PeerGroup:
    layout, store = coordinator.layout, coordinator.store
    assert store is not None
    with connecting(coordinator.describe(layout.rank)):
        return connect_peers(
            backend,
            dist.PrefixStore(f"peers/{layout.shard_rank}", store),
            layout.particle,
            layout.num_particles,
            coordinator.timeout_s,
        )


def _enter_particle(coordinator: StoreCoordinator, environment: ParticleEnvironment) -> None:
    """Host or find the particle's own store, and let the environment describe the particle."""
    layout, store, neighbours = coordinator.layout, coordinator.store, len(coordinator.local_ranks_on_this_node)
    assert store is not None
    key = f"particle/{layout.particle}"
    if layout.shard_rank == 0:
        address = tcp_store.address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if address.startswith(("127.", "::1")) and neighbours < layout.particle_size:
            address = os.environ["MASTER_ADDR"]  # this host's own name leads to loopback; others know better
        store.set(key, f"{address} {environment.host_store(address)}")
    coordinator.wait([key], layout.local_ranks[:1], "the address of its particle")
    address, port = store.get(key).decode().split()
    environment.describe(layout, neighbours, address, int(port))


def _connect_mailbox(coordinator: StoreCoordinator) -> Mailbox:
    layout, store, turn = coordinator.layout, coordinator.store, coordinator.turn("mailbox")
    assert store is not None
    coordinator.barrier(f"mailbox {turn}", layout.peers)
    own = dist.PrefixStore(f"messages/{layout.shard_rank}/{turn}", store)
    with connecting(coordinator.describe(layout.rank)):
        timeout = timedelta(seconds=coordinator.timeout_s)
        group = dist.ProcessGroupGloo(own, layout.particle, layout.num_particles, timeout)
    return GlooMailbox(group, layout.particle, layout.num_particles)
