"""Carves the launcher's world of W ranks into P particles of S ranks, and joins equal shards.

After ``World.carve`` the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) describes the particle,
so that DeepSpeed, Accelerate and the HF Trainer build an ordinary world of S ranks inside it.
Rank i of every particle belongs to the peer group of shard i, a process group of its own that
torch's default world knows nothing about.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist

from ds_pso.distributed import tcp_store
from ds_pso.distributed.coordinator import LINGER_S, Coordinator
from ds_pso.distributed.full_duplex_gloo import FullDuplexGloo
from ds_pso.distributed.layout import Layout, read_int, read_layout
from ds_pso.distributed.mailbox import GlooMailbox, Mailbox
from ds_pso.errors import ConfigError, PeerError
from ds_pso.utils.background_task import Task

_CARVED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
_GOODBYE_S = 30.0  # how long the host of a store waits for its clients to leave


class World(Coordinator):
    """A rank's place in the swarm: the coordinator of the job, its particle, and its peer group."""

    meets_at_sync_points_only = False  # whether particles can do nothing together in between

    # One connection for the life of the process: a rank that joins a second swarm must not meet a store
    # that rank 0 is about to close.
    _launcher_stores: ClassVar[dict[tuple[str, int], dist.TCPStore]] = {}
    _joined: ClassVar[int] = 0  # how many swarms this process has been in; equal on all ranks

    def __init__(self, layout: Layout, timeout_s: float, ranks: Sequence[int] | None = None) -> None:
        super().__init__(layout, timeout_s, ranks)
        self.peer_group: Any = None  # None: one particle
        self.present: Sequence[int] = range(layout.num_particles)  # the particles in it, in order
        self.backend = "none"
        self._particle_store: dist.TCPStore | None = None
        self._mailbox: GlooMailbox | None = None
        self._task: Task | None = None
        self.settled_s = 0.0  # waited for what goes on in the background
        self._saved_env: dict[str, str | None] = {}
        self._torch_was_up = dist.is_initialized()
        self._closed = False

    @classmethod
    def carve(cls, particles: int | Literal["node"], *, peer_backend: str = "auto", timeout_s: float = 600.0) -> World:
        """Split the launcher's world and point the environment at this rank's particle.

        Call it before ``deepspeed.init_distributed``, ``Accelerator()`` or ``TrainingArguments()``.

        Raises:
            ConfigError: P does not divide W, no launcher, or torch.distributed is already up.
            PeerError: some ranks did not arrive within ``timeout_s``; it names them.
        """
        layout = read_layout(particles, os.environ)
        if layout.num_particles > 1 and dist.is_initialized():
            raise ConfigError(
                "torch.distributed is already initialised; call ds_pso.init before "
                "deepspeed.init_distributed, Accelerator() or TrainingArguments()"
            )
        world = cls(layout, timeout_s)
        if "RANK" not in os.environ and not dist.is_initialized():
            # Plain `python script.py`: the environment of a world of one, as a launcher would make it.
            os.environ.setdefault("LOCAL_RANK", "0")
            world._describe_particle("127.0.0.1", world._host_particle_store("127.0.0.1"))
        if layout.world_size > 1:
            try:
                world._join()
                if layout.num_particles > 1:
                    world.backend = _resolve_backend(peer_backend)
                    world.peer_group = world._build_peer_group()
                    world._enter_particle()
            except BaseException:
                world.abandon()
                raise
        return world

    def own_folder(self, folder: Path) -> Path:
        """Where this launch writes what the script puts into ``folder``."""
        return folder

    def particle_folder(self, folder: Path) -> Path:
        """What is this particle's alone."""
        own = f"particle_{self.layout.particle}"
        return folder if own in folder.parts else folder / own

    # -- building ---------------------------------------------------------------------------

    def _join(self) -> None:
        """Open the store of the launcher's world; every rank says hello."""
        address, port = os.environ["MASTER_ADDR"], read_int(os.environ, "MASTER_PORT")
        agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = World._launcher_stores.get((address, port))
        if store is None:
            hosts_store = self.is_leader and not agent_hosts_store
            store = World._launcher_stores[address, port] = self._open_launcher_store(address, port, hosts_store)
        # The store may hold the keys of an earlier attempt of torchrun, or of an earlier swarm of this job.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        World._joined += 1
        self.open(dist.PrefixStore(f"ds_pso/{attempt}/{World._joined}", store))

    def _open_launcher_store(self, address: str, port: int, hosts_store: bool) -> dist.TCPStore:
        try:
            return (tcp_store.host if hosts_store else tcp_store.reach)(address, port, timeout_s=self.timeout_s)
        except (dist.DistError, RuntimeError) as error:
            what = (
                f"rank 0 cannot listen on port {port}; another job may use it: choose another with --master_port"
                if hosts_store
                else f"rank {self.layout.rank} could not reach rank 0 at {address}:{port} within {self.timeout_s:g} s; "
                "check that every node was started and that MASTER_ADDR and MASTER_PORT are right"
            )
            raise PeerError(f"{what} ({str(error).splitlines()[0]})") from error

    def _build_peer_group(self) -> Any:
        """A process group of this rank's peers, unknown to torch's default world."""
        layout = self.layout
        assert self.store is not None
        store = dist.PrefixStore(f"peers/{layout.shard_rank}", self.store)
        timeout = timedelta(seconds=self.timeout_s)
        if self.backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with self._connecting():
            if self.backend == "gloo":
                return FullDuplexGloo(store, layout.particle, layout.num_particles, timeout)
            options = dist.ProcessGroupNCCL.Options()
            # Longer than Exchange waits, so that an error is raised before the watchdog ends the process.
            options._timeout = 2 * timeout
            return dist.ProcessGroupNCCL(store, layout.particle, layout.num_particles, options)

    @contextlib.contextmanager
    def _connecting(self) -> Iterator[None]:
        layout = self.layout
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"{self.describe(layout.rank)}: its peers do not connect ({str(error).splitlines()[0]}); check that "
                "the nodes reach each other on all ports, and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where a node "
                "has several networks"
            ) from error

    def _enter_particle(self) -> None:
        """Host or find the particle's own store, and let the environment describe the particle."""
        layout = self.layout
        assert self.store is not None
        key = f"particle/{layout.particle}"
        if layout.shard_rank == 0:
            address = tcp_store.address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            if address.startswith(("127.", "::1")) and len(self.local_ranks_on_this_node) < layout.particle_size:
                address = os.environ["MASTER_ADDR"]  # this host's own name leads to loopback; others know better
            self.store.set(key, f"{address} {self._host_particle_store(address)}")
        self._wait([key], layout.local_ranks[:1], "the address of its particle")
        address, port = self.store.get(key).decode().split()
        self._describe_particle(address, int(port))

    def _host_particle_store(self, address: str) -> int:
        """Host the particle's store and return its port.

        It is handed to torch as an agent's store: so the system may pick the port, and no port is
        free for a moment and taken by another the next.
        """
        self._particle_store = tcp_store.host(address)
        return self._particle_store.port

    def _describe_particle(self, address: str, port: int) -> None:
        self._saved_env = {name: os.environ.get(name) for name in _CARVED}
        os.environ.update(
            RANK=str(self.layout.shard_rank),
            WORLD_SIZE=str(self.layout.particle_size),
            LOCAL_WORLD_SIZE=str(len(self.local_ranks_on_this_node)),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )

    # -- talking to the peers ---------------------------------------------------------------

    @property
    def peer_device(self) -> torch.device:
        """Where the tensors lie that the peer group moves."""
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    def open_mailbox(self) -> Mailbox:
        """Messages to and from the peers, on connections of their own."""
        layout = self.layout
        assert self.store is not None
        turn = self.turn("mailbox")
        self.barrier(f"mailbox {turn}", layout.peers)
        store = dist.PrefixStore(f"messages/{layout.shard_rank}/{turn}", self.store)
        if self._mailbox is not None:
            self._mailbox.close()  # of an earlier swarm on this world
        with self._connecting():
            timeout = timedelta(seconds=self.timeout_s)
            group = dist.ProcessGroupGloo(store, layout.particle, layout.num_particles, timeout)
        self._mailbox = GlooMailbox(group, layout.particle, layout.num_particles)
        return self._mailbox

    # -- in the background ------------------------------------------------------------------

    def in_background(self, job: Callable[[], None]) -> None:
        """Begin a job that talks to peers, not to local ranks. Called alike on all ranks."""
        self.settle()
        self._task = Task(job)

    def beside(self, job: Callable[[Coordinator], None]) -> Task | None:
        """Begin a job that meets the other ranks, on a connection of its own; None: it is done. Called alike on all."""
        second_connection = self.second_connection()
        return Task(lambda: job(second_connection))

    def settle(self) -> None:
        self.wait_for_task()
        if self._task is not None and not self._task.is_mine:
            self._task = None

    def wait_for_task(self, until: threading.Event | None = None) -> None:
        """Until what goes on in the background is done, or has set the event; raises what it raised."""
        if self._task is not None and not self._task.is_mine:
            begin = time.perf_counter()
            self._task.wait(until)
            self.settled_s += time.perf_counter() - begin

    # -- talking inside the particle --------------------------------------------------------

    @property
    def particle_device(self) -> torch.device:
        """Where the particle's own collectives run, once DeepSpeed has built its world."""
        if dist.is_initialized() and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def particle_gather(self, values: list[float]) -> list[list[float]]:
        """A few float64 of every rank of this particle, exactly, in the order of ranks."""
        if self.layout.particle_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.particle_device)
        rows = [torch.empty_like(mine) for _ in range(self.layout.particle_size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    @property
    def closed(self) -> bool:
        """Whether this rank has left it."""
        return self._closed

    def shrink(self) -> None:
        """After peers were lost: roll calls, values from all and agreement are among this particle's ranks from now on.

        Raises:
            PeerError: not all of them are here.
        """
        layout = self.layout
        patience = min(_GOODBYE_S, self.timeout_s) + LINGER_S  # the leader may raise so much later than its local ranks
        self._task = None  # what it raised is known
        try:
            address, port = os.environ["MASTER_ADDR"], read_int(os.environ, "MASTER_PORT")
            store = tcp_store.reach(address, port, timeout_s=patience)
        except (dist.DistError, RuntimeError) as error:
            raise PeerError(f"{self.describe(layout.rank)}: the first rank of its particle was lost") from error
        self.ranks, self.store, self._turns, self._frozen = (
            layout.local_ranks,
            dist.PrefixStore("ds_pso/shrunk", store),
            {},
            False,
        )
        timeout_s, self.timeout_s = self.timeout_s, patience
        try:
            self.barrier("those who are left", layout.local_ranks)
        finally:
            self.timeout_s = timeout_s

    # -- leaving ----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave in good order: nobody's store goes away while another still needs it."""
        if self._closed:
            return
        try:
            self.settle()
        except BaseException:
            self.abandon()
            raise
        layout = self.layout
        if dist.is_initialized() and not self._torch_was_up:
            dist.destroy_process_group()
        if self.store is not None:
            self._close_mailbox()
            self._shut_peer_group()
            with contextlib.suppress(dist.DistError, RuntimeError):
                patience = timedelta(seconds=min(_GOODBYE_S, self.timeout_s))
                if layout.shard_rank == 0:
                    local_ranks = [f"bye/{rank}" for rank in layout.local_ranks[1:]]
                    if local_ranks:
                        self.store.wait(local_ranks, patience)
                if self.is_leader:
                    firsts = [f"bye/{rank}" for rank in self.ranks[:: layout.particle_size][1:]]
                    if firsts:
                        self.store.wait(firsts, patience)
                else:
                    self.store.set(f"bye/{layout.rank}", "1")
                    if layout.shard_rank == 0:
                        time.sleep(0.05)  # lets the message leave before the socket closes
        self.abandon()

    def _close_mailbox(self) -> None:
        mailbox, self._mailbox = self._mailbox, None
        if mailbox is not None:
            mailbox.close()

    def _shut_peer_group(self) -> None:
        group, self.peer_group = self.peer_group, None
        if group is not None and self.backend == "nccl":
            group.shutdown()

    def abandon(self) -> None:
        """Leave at once, waiting for nobody, and put the launcher's environment back."""
        self._closed = True
        self._close_mailbox()
        for name, value in self._saved_env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved_env = {}
        self.peer_group = self.store = self._particle_store = None


def _resolve_backend(name: str) -> str:
    if name == "auto":
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if name == "nccl" and not torch.cuda.is_available():
        raise ConfigError('swarm.peer_backend = "nccl": no GPU is visible; use "auto" or "gloo"')
    return name
