"""The ranks of one launch: barriers, small values from all to all, and agreement, over one key-value store.

Every wait ends within a time limit and says who was missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import torch.distributed as dist

from ds_pso.distributed.layout import Layout
from ds_pso.errors import PeerError, SwarmError
from ds_pso.utils.background_task import Background, Task

_LOOK_S = 1.0  # after which a rank that waits looks whether the others have closed
LINGER_S = 5.0  # how much later than the timeout another rank may still give up

Answer = TypeVar("Answer")
Value = TypeVar("Value")
log = logging.getLogger(__name__)


class Coordinator(Protocol):
    """The decisions that the ranks of a launch make together: over a store, or between threads of a simulation."""

    layout: Layout
    timeout_s: float
    ranks: Sequence[int]  # of the launcher's world, that take part

    @property
    def is_leader(self) -> bool:
        """True on the first of ``ranks``."""

    @property
    def local_ranks_on_this_node(self) -> list[int]:
        """Launcher's ranks of this particle that share this rank's machine."""

    def describe(self, rank: int) -> str:
        """Name a rank: ``particle 1, rank 0 (rank 2 on host gpu-07)``."""

    def barrier(self, label: str, ranks: Iterable[int]) -> None:
        """Say that this rank has arrived at ``label``, and wait for ``ranks``.

        Raises:
            PeerError: after ``timeout_s``; it names who is missing.
        """

    def next_barrier(self, label: str, ranks: Sequence[int], *, with_local_ranks: bool = False) -> None:
        """Hold the next of many barriers of one label, and forget those that everybody has passed.

        Args:
            with_local_ranks: wait for these, too, and where a rank of the particle waits in vain, let its local ranks
                raise what it raises. Else they would go on, and wait for it inside the particle.

        Raises:
            PeerError: as ``barrier`` does.
        """

    def turn(self, label: str) -> int:
        """Count how often this was asked before with this label."""

    def gather(self, label: str, value: Value) -> list[Value]:
        """Return one small JSON value of every rank, in the order of ranks, on every rank."""

    def agree(self, label: str) -> contextlib.AbstractContextManager[None]:
        """Run the block on every rank; if it raises on any, raise the first error on all.

        So a file that only one rank finds damaged stops everybody with the same words.
        """

    def leads_disk(self, folder: Path) -> bool:
        """True on one rank for each disk that ``folder`` lies on; made if missing. Called on all ranks.

        Nodes may share the disk or have one each: the lowest rank whose mark is seen there leads.
        """

    def beside(self, job: Callable[[Coordinator], None]) -> Task | None:
        """Start a job in a thread, which waits for the other ranks on a connection of its own. Called alike on all.

        Returns:
            The thread's task; None: the job is done already.
        """

    def second_connection(self, timeout_s: float | None = None) -> StoreCoordinator:
        """Return a coordinator of the same ranks, for a thread beside this one. Called alike on all ranks."""

    def confine(self, store: dist.Store, patience_s: float) -> None:
        """Count only this particle's ranks from now on, after peers were lost, and find them on ``store``.

        Raises:
            PeerError: not all of them are here within ``patience_s``.
        """

    def say_closed(self, steps: int) -> None:
        """Tell those who wait for this rank, now or later, that it will not come.

        Args:
            steps: optimizer steps that it has taken.
        """

    def leave(self, patience: timedelta) -> None:
        """Wait until nobody needs this rank's store any more."""

    def disconnect(self) -> None:
        """Use the store no more."""


class StoreCoordinator:
    """A ``Coordinator`` over a ``torch.distributed.Store``.

    Args:
        background: settled before ranks do something together, so that they do it in one order.
        ranks: of the swarm that this launcher has started; all of them unless each particle is a job of its own.
    """

    def __init__(
        self, layout: Layout, timeout_s: float, background: Background, ranks: Sequence[int] | None = None
    ) -> None:
        self.layout = layout
        self.timeout_s = timeout_s
        self.background = background
        self.ranks: Sequence[int] = range(layout.world_size) if ranks is None else ranks
        self.store: dist.Store | None = None  # None: a world of one rank
        self._turns: dict[str, int] = {}  # of each label
        self._hosts = [""] * layout.world_size  # by rank, once known
        self._frozen = False  # the host of the store does not answer

    def open(self, store: dist.Store) -> None:
        """Find the others on ``store``, and learn which machine each runs on."""
        self.store = store
        store.set(f"host/{self.layout.rank}", socket.gethostname())
        self.barrier("start", self.ranks)
        hosts = store.multi_get([f"host/{rank}" for rank in self.ranks])
        for rank, host in zip(self.ranks, hosts, strict=True):
            self._hosts[rank] = host.decode()

    def second_connection(self, timeout_s: float | None = None) -> StoreCoordinator:
        # One TCPStore answers one question at a time: a thread that waits would hold this one up.
        other = StoreCoordinator(self.layout, timeout_s or self.timeout_s, Background(), self.ranks)
        other._hosts = self._hosts
        if self.store is not None:
            prefix = f"second_connection/{self.turn('second_connection')}"
            other.store = dist.PrefixStore(prefix, self.store.clone())  # type: ignore[attr-defined]
        return other

    def beside(self, job: Callable[[Coordinator], None]) -> Task | None:
        connection = self.second_connection()
        return Task(lambda: job(connection))

    def confine(self, store: dist.Store, patience_s: float) -> None:
        self.ranks, self.store, self._turns, self._frozen = self.layout.local_ranks, store, {}, False
        label = "those who are left"
        store.set(f"at/{label}/{self.layout.rank}", "1")
        self.wait([f"at/{label}/{rank}" for rank in self.ranks], self.ranks, label, patience_s)

    @property
    def is_leader(self) -> bool:
        return self.layout.rank == self.ranks[0]

    def _on_this_node(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if self._hosts[rank] == self._hosts[self.layout.rank]]

    @property
    def local_ranks_on_this_node(self) -> list[int]:
        return self._on_this_node(self.layout.local_ranks)

    def leads_disk(self, folder: Path) -> bool:
        mark = f".leader-{self.gather('the name of a mark', uuid.uuid4().hex)[0]}-"
        mine = folder / f"{mark}{self.layout.rank:06d}"
        is_node_leader = self._on_this_node(self.ranks)[0] == self.layout.rank
        with self.agree("finding who shares a disk"):
            if is_node_leader:
                folder.mkdir(parents=True, exist_ok=True)
                mine.touch()
        leads = False
        with self.agree("finding who shares a disk"):
            if is_node_leader:
                leads = min(folder.glob(f"{mark}*")).name == mine.name
        with self.agree("finding who shares a disk"):
            if is_node_leader:
                mine.unlink()
        return leads

    def describe(self, rank: int) -> str:
        layout = Layout(rank, self.layout.world_size, self.layout.num_particles)
        host = f" on host {self._hosts[rank]}" if self._hosts[rank] else ""
        return f"particle {layout.particle}, rank {layout.shard_rank} (rank {rank}{host})"

    def barrier(self, label: str, ranks: Iterable[int]) -> None:
        if self.store is None:
            return
        self.background.settle()
        self.store.set(f"at/{label}/{self.layout.rank}", "1")
        expected = [rank for rank in ranks if rank in self.ranks]
        self.wait([f"at/{label}/{rank}" for rank in expected], expected, label)

    def turn(self, label: str) -> int:
        self._turns[label] = self._turns.get(label, -1) + 1
        return self._turns[label]

    def next_barrier(self, label: str, ranks: Sequence[int], *, with_local_ranks: bool = False) -> None:
        turn, store = self.turn(label), self.store
        if store is None:
            return
        name = f"{label} {turn}"
        if with_local_ranks and self.layout.particle_size > 1:
            self._barrier_with_local_ranks(name, ranks, store)
        else:
            self.barrier(name, ranks)
        if turn > 1:  # the last one may have been of others
            for mark in ("at", "passed"):
                store.delete_key(f"{mark}/{label} {turn - 2}/{self.layout.rank}")

    def _barrier_with_local_ranks(self, label: str, ranks: Sequence[int], store: dist.Store) -> None:
        local_ranks = self.layout.local_ranks
        expected, mark = sorted({*ranks, *local_ranks}), f"passed/{label}"
        if self.background.task is not None:
            self.background.settle()
        store.set(f"at/{label}/{self.layout.rank}", "1")
        try:
            self.wait([f"at/{label}/{rank}" for rank in expected], expected, label)
        except PeerError as error:
            text = str(error)
            with contextlib.suppress(dist.DistError, RuntimeError, TimeoutError):  # the store may be what was lost
                self._ask(lambda: store.set(f"{mark}/{self.layout.rank}", text), self.timeout_s)
            raise
        store.set(f"{mark}/{self.layout.rank}", "")
        keys = [f"{mark}/{rank}" for rank in local_ranks]
        self.wait(keys, local_ranks, label)
        lost = next((text for text in store.multi_get(keys) if text), None)
        if lost is not None:
            raise PeerError(lost.decode())

    def wait(
        self,
        keys: Sequence[str],
        ranks: Sequence[int],
        label: str,
        timeout_s: float | None = None,
        signs: Sequence[str] | None = None,
    ) -> None:
        """Wait for keys of the store.

        Args:
            ranks: who sets them, one each.
            timeout_s: instead of the coordinator's.
            signs: keys that show which of ``ranks`` are there, where that are not ``keys`` themselves.

        Raises:
            PeerError: they did not come; it names whose. At once if one of them has closed.
        """
        store, limit_s = self.store, self.timeout_s if timeout_s is None else timeout_s
        signs, end = keys if signs is None else signs, time.monotonic() + limit_s
        assert store is not None
        while True:
            left_s = max(0.001, end - time.monotonic())
            slice_s = min(_LOOK_S, left_s)
            try:
                return self._ask(lambda s=slice_s: store.wait(list(keys), timedelta(seconds=s)), left_s)  # type: ignore[misc]
            except (dist.DistError, RuntimeError, TimeoutError) as error:
                if self._frozen or left_s <= _LOOK_S:
                    raise self._lost(signs, ranks, label, limit_s, error) from error
            try:
                self._raise_if_closed(keys, signs, ranks, label)
            except (dist.DistError, TimeoutError) as error:
                raise self._lost(signs, ranks, label, limit_s, error) from error

    def _lost(
        self, signs: Sequence[str], ranks: Sequence[int], label: str, limit_s: float, error: Exception
    ) -> PeerError:
        text = f"{self._who_is_missing(signs, ranks, label, limit_s)} ({type(error).__name__})"
        if self.is_leader:
            time.sleep(min(LINGER_S, limit_s))  # those who give up a little later ask this rank's store
        return PeerError(text)

    def _raise_if_closed(self, keys: Sequence[str], signs: Sequence[str], ranks: Sequence[int], label: str) -> None:
        store = self.store
        assert store is not None

        def closed() -> dict[int, str]:
            missing = [rank for sign, rank in zip(signs, ranks, strict=True) if not store.check([sign])]
            found = {r: store.get(f"closed/{r}").decode() for r in missing if store.check([f"closed/{r}"])}
            # Who has come, gone and closed since then has left what is waited for.
            return {} if store.check(list(keys)) else found

        found = self._ask(closed, self.timeout_s)
        if found:
            who = "; ".join(f"{self.describe(rank)} after {steps} optimizer steps" for rank, steps in found.items())
            if self.is_leader:
                time.sleep(min(2 * _LOOK_S, self.timeout_s))  # the others look a little later, in this rank's store
            raise PeerError(
                f"{self.describe(self.layout.rank)}: waits for {label}, and these have closed their swarm: {who}. All "
                "particles must take equally many steps: swarm.sampler gives each as many batches; of data of your "
                "own, end all particles at the same step",
                agreed=True,
            )

    def _ask(self, question: Callable[[], Answer], limit_s: float) -> Answer:
        """Return the store's answer. TCPStore's own timeouts wait for its host to confirm them, frozen or not.

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
        threading.Thread(target=ask, daemon=True, name="ds_pso store").start()
        try:
            answer, error = answers.get(timeout=limit_s + LINGER_S)
        except queue.Empty:
            self._frozen = True
            log.warning("the store has not answered for %g s", limit_s + LINGER_S)
            raise TimeoutError from None
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def _who_is_missing(self, keys: Sequence[str], ranks: Sequence[int], label: str, limit_s: float) -> str:
        me = self.describe(self.layout.rank)
        store = self.store
        assert store is not None
        try:
            there = self._ask(lambda: [store.check([key]) for key in keys], limit_s)
        except (dist.DistError, RuntimeError, TimeoutError):
            return (
                f"{me}: the store of rank 0 no longer answers, waiting for {label}; rank 0 was lost or hangs: "
                "look for its error above, then restart from the last checkpoint"
            )
        missing = [rank for rank, is_there in zip(ranks, there, strict=True) if not is_there]
        return (
            f"{me}: waited {limit_s:g} s for {label}, and these did not arrive: "
            f"{'; '.join(self.describe(rank) for rank in missing) or 'nobody is missing any more'}. "
            "Look at their logs, or raise swarm.timeout_s if they are only slow"
        )

    def gather(self, label: str, value: Value) -> list[Value]:
        if self.store is None:
            return [json.loads(json.dumps(value))]
        self.background.settle()
        turn = self.turn(label)
        key = f"gather/{label}/{turn}"
        ranks = list(self.ranks)
        keys = [f"{key}/{rank}" for rank in ranks]
        self.store.set(f"{key}/{self.layout.rank}", json.dumps(value))
        if self.is_leader:
            self.wait(keys, ranks, label)
            everything = [json.loads(item) for item in self.store.multi_get(keys)]
            self.store.set(f"{key}/all", json.dumps(everything))
            for item in [*keys, f"gather/{label}/{turn - 1}/all"]:  # who is here has read the last turn's
                self.store.delete_key(item)
            return everything
        self.wait([f"{key}/all"], ranks, label, signs=keys)
        return list(json.loads(self.store.get(f"{key}/all")))

    def agree(self, label: str) -> contextlib.AbstractContextManager[None]:
        return agreement(self, label)

    def say_closed(self, steps: int) -> None:
        if self.store is not None:
            self.store.set(f"closed/{self.layout.rank}", str(steps))

    def leave(self, patience: timedelta) -> None:
        layout, store = self.layout, self.store
        if store is None:
            return
        if layout.shard_rank == 0 and layout.particle_size > 1:
            store.wait([f"left/{rank}" for rank in layout.local_ranks[1:]], patience)
        if not self.is_leader:
            store.set(f"left/{layout.rank}", "1")
            if layout.shard_rank == 0:
                time.sleep(0.05)  # lets the message leave before the socket closes
            return
        firsts = self.ranks[:: layout.particle_size][1:]
        if firsts:
            store.wait([f"left/{rank}" for rank in firsts], patience)

    def disconnect(self) -> None:
        self.store = None


@contextlib.contextmanager
def agreement(coordinator: Coordinator, label: str) -> Iterator[None]:
    """Carry out ``Coordinator.agree`` by means of its ``gather``."""
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
    messages = coordinator.gather(label, None if failure is None else [type(failure).__name__, str(failure)])
    first = next((item for item in messages if item), None)
    if first is not None:
        kinds = {kind.__name__: kind for kind in SwarmError.__subclasses__()}
        raise kinds.get(first[0], SwarmError)(first[1], agreed=True) from failure
