"""Carves the launcher's world of W ranks into P particles of S ranks, and joins equal shards.

After ``World.carve`` the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) describes the particle,
so that DeepSpeed, Accelerate and the HF Trainer build an ordinary world of S ranks inside it.
Rank i of every particle belongs to the peer group of shard i, a process group of its own that
torch's default world knows nothing about.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from ds_pso.errors import ConfigError, PeerError, SwarmError
from ds_pso.layout import Layout, read_int, read_layout

_CARVED = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
_GOODBYE_S = 30.0  # how long the host of a store waits for its clients to leave
_LINGER_S = 5.0  # how much later than the timeout another rank may still give up

Answer = TypeVar("Answer")


class World:
    """A rank's place in the swarm, and the means to talk about it: a store and the peer group."""

    _joined = 0  # how many swarms this process has been in; equal on all ranks

    def __init__(self, layout: Layout, timeout_s: float) -> None:
        self.layout = layout
        self.timeout_s = timeout_s
        self.store: dist.Store | None = None  # None: a world of one rank
        self.peer_group: Any = None  # None: one particle
        self.backend = "none"
        self._particle_store: dist.TCPStore | None = None
        self._saved_env: dict[str, str | None] = {}
        self._turns: dict[str, int] = {}  # of each label of gather
        self._hosts = [""] * layout.world_size  # by launcher's rank, once known
        self._torch_was_up = dist.is_initialized()
        self._closed = False
        self._frozen = False  # the host of the store does not answer

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
                    try:
                        world.peer_group = world._build_peer_group()
                    except RuntimeError as error:
                        raise PeerError(
                            f"{world.describe(layout.rank)}: its peers do not connect ({str(error).splitlines()[0]}); "
                            "check that the nodes reach each other on all ports, and GLOO_SOCKET_IFNAME or "
                            "NCCL_SOCKET_IFNAME where a node has several networks"
                        ) from error
                    world._enter_particle()
            except BaseException:
                world.abandon()
                raise
        return world

    # -- building ---------------------------------------------------------------------------

    def _join(self) -> None:
        """Open the store of the launcher's world; every rank says hello."""
        layout = self.layout
        address, port = os.environ["MASTER_ADDR"], read_int(os.environ, "MASTER_PORT")
        agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts_store = layout.rank == 0 and not agent_hosts_store
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=hosts_store,
                timeout=timedelta(seconds=self.timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError) as error:
            what = (
                f"rank 0 cannot listen on port {port}; another job may use it: choose another with --master_port"
                if hosts_store
                else f"rank {layout.rank} could not reach rank 0 at {address}:{port} within {self.timeout_s:g} s; "
                "check that every node was started and that MASTER_ADDR and MASTER_PORT are right"
            )
            raise PeerError(f"{what} ({str(error).splitlines()[0]})") from error
        # The agent's store of torchrun keeps the keys of earlier attempts, and of earlier swarms of this job.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"ds_pso/{attempt}/{World._joined}", store)
        World._joined += 1
        self.store.set(f"host/{layout.rank}", socket.gethostname())
        self.roll_call("start", range(layout.world_size))
        hosts = self.store.multi_get([f"host/{rank}" for rank in range(layout.world_size)])
        self._hosts = [host.decode() for host in hosts]

    def _build_peer_group(self) -> Any:
        """A process group of this rank's peers, unknown to torch's default world."""
        layout = self.layout
        assert self.store is not None
        store = dist.PrefixStore(f"peers/{layout.shard_rank}", self.store)
        timeout = timedelta(seconds=self.timeout_s)
        if self.backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            options = dist.ProcessGroupNCCL.Options()
            # Longer than Exchange waits, so that an error is raised before the watchdog ends the process.
            options._timeout = 2 * timeout
            return dist.ProcessGroupNCCL(store, layout.particle, layout.num_particles, options)
        return dist.ProcessGroupGloo(store, layout.particle, layout.num_particles, timeout)

    def _enter_particle(self) -> None:
        """Host or find the particle's own store, and let the environment describe the particle."""
        layout = self.layout
        assert self.store is not None
        key = f"particle/{layout.particle}"
        if layout.shard_rank == 0:
            address = _address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            if address.startswith(("127.", "::1")) and len(self.mates_on_this_node) < layout.particle_size:
                address = os.environ["MASTER_ADDR"]  # this host's own name leads to loopback; others know better
            self.store.set(key, f"{address} {self._host_particle_store(address)}")
        self._wait([key], layout.mates[:1], "the address of its particle")
        address, port = self.store.get(key).decode().split()
        self._describe_particle(address, int(port))

    def _host_particle_store(self, address: str) -> int:
        """Host the particle's store and return its port.

        It is handed to torch as an agent's store: so the system may pick the port, and no port is
        free for a moment and taken by another the next.
        """
        self._particle_store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return self._particle_store.port

    def _describe_particle(self, address: str, port: int) -> None:
        self._saved_env = {name: os.environ.get(name) for name in _CARVED}
        os.environ.update(
            RANK=str(self.layout.shard_rank),
            WORLD_SIZE=str(self.layout.particle_size),
            LOCAL_WORLD_SIZE=str(len(self.mates_on_this_node)),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )

    # -- talking ----------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """True on one rank of the whole swarm: rank 0 of particle 0."""
        return self.layout.rank == 0

    def _on_this_node(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if self._hosts[rank] == self._hosts[self.layout.rank]]

    @property
    def mates_on_this_node(self) -> list[int]:
        """Launcher's ranks of this particle that share this rank's machine."""
        return self._on_this_node(self.layout.mates)

    @property
    def is_node_leader(self) -> bool:
        """True on the lowest rank of each machine: the one that makes and renames folders."""
        return self._on_this_node(range(self.layout.rank + 1))[0] == self.layout.rank

    def leads_disk(self, folder: Path) -> bool:
        """True on one rank for each disk that ``folder`` lies on; made if missing. Called on all ranks.

        Nodes may share the disk or have one each: the lowest rank whose mark is seen there leads.
        """
        mark = f".leader-{self.gather('the name of a mark', uuid.uuid4().hex)[0]}-"
        with self.agree("finding who shares a disk"):
            if self.is_node_leader:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{mark}{self.layout.rank:06d}").touch()
        leads = False
        with self.agree("finding who shares a disk"):
            if self.is_node_leader:
                leads = min(folder.glob(f"{mark}*")).name == f"{mark}{self.layout.rank:06d}"
        with self.agree("finding who shares a disk"):
            if self.is_node_leader:
                (folder / f"{mark}{self.layout.rank:06d}").unlink()
        return leads

    def describe(self, rank: int) -> str:
        """``particle 1, rank 0 (rank 2 on host gpu-07)``"""
        layout = Layout(rank, self.layout.world_size, self.layout.num_particles)
        host = f" on host {self._hosts[rank]}" if self._hosts[rank] else ""
        return f"particle {layout.particle}, rank {layout.shard_rank} (rank {rank}{host})"

    def roll_call(self, label: str, ranks: Iterable[int]) -> None:
        """Say that this rank has arrived at ``label``, and wait for ``ranks``.

        Raises:
            PeerError: after ``timeout_s``; it names who is missing.
        """
        if self.store is None:
            return
        self.store.set(f"at/{label}/{self.layout.rank}", "1")
        expected = list(ranks)
        self._wait([f"at/{label}/{rank}" for rank in expected], expected, label)

    def forget(self, label: str) -> None:
        """Drop this rank's mark at ``label``, once everybody is known to have passed it."""
        if self.store is not None:
            self.store.delete_key(f"at/{label}/{self.layout.rank}")

    def _wait(self, keys: list[str], ranks: list[int], label: str) -> None:
        store = self.store
        assert store is not None
        try:
            self._ask(lambda: store.wait(keys, timedelta(seconds=self.timeout_s)))
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            text = f"{self._who_is_missing(keys, ranks, label)} ({type(error).__name__})"
            if self.is_leader:
                time.sleep(min(_LINGER_S, self.timeout_s))  # those who give up a little later ask this rank's store
            raise PeerError(text) from error

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The store's answer. TCPStore's own timeouts wait for its host to confirm them, frozen or not.

        Raises:
            TimeoutError: the host is frozen; the store must not be used again.
        """
        answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:
                answers.put((None, error))

        if self._frozen:
            raise TimeoutError
        threading.Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=self.timeout_s + _LINGER_S)
        except queue.Empty:
            self._frozen = True
            raise TimeoutError from None
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def _who_is_missing(self, keys: list[str], ranks: list[int], label: str) -> str:
        me = self.describe(self.layout.rank)
        store = self.store
        assert store is not None
        try:
            there = self._ask(lambda: [store.check([key]) for key in keys])
        except (dist.DistError, RuntimeError, TimeoutError):
            return (
                f"{me}: the store of rank 0 no longer answers, waiting for {label}; rank 0 was lost or hangs: "
                "look for its error above, then restart from the last checkpoint"
            )
        missing = [rank for rank, is_there in zip(ranks, there, strict=True) if not is_there]
        return (
            f"{me}: waited {self.timeout_s:g} s for {label}, and these did not arrive: "
            f"{'; '.join(self.describe(rank) for rank in missing) or 'nobody is missing any more'}. "
            "Look at their logs, or raise swarm.timeout_s if they are only slow"
        )

    def barrier(self, label: str) -> None:
        """Wait for all W ranks."""
        self.gather(label, None)

    def gather(self, label: str, value: Any) -> list[Any]:
        """One small JSON value of every rank, in the order of ranks, on every rank."""
        if self.store is None:
            return [json.loads(json.dumps(value))]
        turn = self._turns[label] = self._turns.get(label, -1) + 1
        key = f"gather/{label}/{turn}"
        ranks = list(range(self.layout.world_size))
        keys = [f"{key}/{rank}" for rank in ranks]
        self.store.set(keys[self.layout.rank], json.dumps(value))
        if self.is_leader:
            self._wait(keys, ranks, label)
            everything = [json.loads(item) for item in self.store.multi_get(keys)]
            self.store.set(f"{key}/all", json.dumps(everything))
            for item in [*keys, f"gather/{label}/{turn - 1}/all"]:  # who is here has read the last turn's
                self.store.delete_key(item)
            return everything
        store = self.store
        try:
            self._ask(lambda: store.wait([f"{key}/all"], timedelta(seconds=self.timeout_s)))
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            raise PeerError(self._who_is_missing(keys, ranks, label)) from error
        return list(json.loads(self.store.get(f"{key}/all")))

    @contextlib.contextmanager
    def agree(self, label: str) -> Iterator[None]:
        """Run the block on every rank; if it raises on any, raise the first error on all.

        So a file that only one rank finds damaged stops everybody with the same words.
        """
        failure: SwarmError | None = None
        try:
            yield
        except SwarmError as error:
            failure = error
        except OSError as error:
            failure = SwarmError(f"{error.filename or label}: {error.strerror or error}")
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure = SwarmError(f"{label}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        messages = self.gather(label, None if failure is None else [type(failure).__name__, str(failure)])
        first = next((item for item in messages if item), None)
        if first is not None:
            kinds = {kind.__name__: kind for kind in SwarmError.__subclasses__()}
            raise kinds.get(first[0], SwarmError)(first[1], agreed=True) from failure

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

    # -- leaving ----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave in good order: nobody's store goes away while another still needs it."""
        if self._closed:
            return
        layout = self.layout
        if dist.is_initialized() and not self._torch_was_up:
            dist.destroy_process_group()
        if self.store is not None:
            self._shut_peer_group()
            with contextlib.suppress(dist.DistError, RuntimeError):
                patience = timedelta(seconds=min(_GOODBYE_S, self.timeout_s))
                if layout.shard_rank == 0:
                    mates = [f"bye/{mate}" for mate in layout.mates[1:]]
                    if mates:
                        self.store.wait(mates, patience)
                if layout.rank == 0:
                    firsts = range(layout.particle_size, layout.world_size, layout.particle_size)
                    self.store.wait([f"bye/{rank}" for rank in firsts], patience)
                else:
                    self.store.set(f"bye/{layout.rank}", "1")
                    if layout.shard_rank == 0:
                        time.sleep(0.05)  # lets the message leave before the socket closes
        self.abandon()

    def _shut_peer_group(self) -> None:
        group, self.peer_group = self.peer_group, None
        if group is not None and self.backend == "nccl":
            group.shutdown()

    def abandon(self) -> None:
        """Leave at once, waiting for nobody, and put the launcher's environment back."""
        self._closed = True
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


def _address_towards(address: str, port: int) -> str:
    """This machine's address on the way to ``address``: the one its mates can reach, too."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a UDP socket sends nothing
        probe.connect(target)
        return str(probe.getsockname()[0])
