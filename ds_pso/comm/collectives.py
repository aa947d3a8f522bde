"""One collective of a peer group after the other: timed, counted, checked if wanted, and explained where it fails."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from ds_pso.distributed.peer_group import Work
from ds_pso.distributed.world import World
from ds_pso.errors import PeerError
from ds_pso.utils.checksums import TRIES, Moved, sealed, unsealed


@dataclass
class Traffic:
    """Sums over all collectives of a rank.

    Attributes:
        bytes_received: by this rank.
        seconds: inside collectives, waiting included.
        repeated: collectives that were damaged on the way.
    """

    bytes_received: int = 0
    seconds: float = 0.0
    repeated: int = 0


class Collectives:
    """Runs collectives on the peer group that the world has when each begins.

    Attributes:
        device: where the tensors lie that are moved.
        traffic: sums so far.
        checksums: compare what has arrived with what was sent.
    """

    def __init__(self, world: World, *, checksums: bool = False) -> None:
        self.world = world
        self.device = world.peers.device
        self.traffic = Traffic()
        self.checksums = checksums

    def run(
        self,
        name: str,
        collective: str,
        arguments: Sequence[object],
        received: float,
        *,
        moved: Callable[[], Moved],
        refill: Callable[[], None] | None = None,
    ) -> None:
        """Run a collective, and again if it was damaged on the way; count its bytes and its time.

        Args:
            name: for errors and warnings.
            collective: method of the process group, called with ``arguments``.
            received: bytes, by this rank.
            moved: returns what will be moved; called before each try if checksums are compared.
            refill: called before each try but the first, where the collective overwrites what it moves.

        Raises:
            PeerError: a peer was lost or is too slow, or the link damages whatever is sent.
        """
        group, present = self.world.peers.group, self.world.peers.present
        if group is None:
            assert len(present) == 1, "others are there, and no connections to them"
            return
        for count in range(1, TRIES + 1):
            if refill is not None and count > 1:
                refill()
            sums = moved() if self.checksums else None
            if self.world.background.task is not None:
                self.world.background.settle()
            begin = time.perf_counter()
            with self._explained(name):
                work: Work = getattr(group, collective)(*arguments)
                if self.device.type == "cuda":
                    # Blocks, unlike NCCL's wait without a timeout.
                    work.wait(timedelta(seconds=self.world.coordinator.timeout_s))
                    torch.cuda.current_stream().synchronize()
                else:
                    work.wait()
            self.traffic.seconds += time.perf_counter() - begin
            self.traffic.bytes_received += round(received)
            if sums is None:
                return
            damage = sums.damage(self._gather_rows(name, sums.row()))
            if not damage:
                return
            me = self.world.coordinator.describe(self.world.layout.rank)
            if count == TRIES:
                raise PeerError(
                    f"{me}: {damage} did not arrive as it was sent, {TRIES} times in a row (the {name} with its "
                    "peers); a link, a network card or memory is damaged: look for which, then restart from the last "
                    "checkpoint"
                )
            self.traffic.repeated += 1
            if self.world.layout.particle == present[0]:  # one of those who all know it
                warnings.warn(
                    f"{me}: {damage} did not arrive as it was sent; the {name} is repeated ({count} of {TRIES - 1})",
                    stacklevel=2,
                )

    def _gather_rows(self, name: str, row: list[int]) -> list[list[int]]:
        """Return the checksums of all peers.

        Raises:
            PeerError: these are damaged, too, so nobody could know who goes on and who repeats.
        """
        group, present = self.world.peers.group, self.world.peers.present
        assert group is not None
        mine = torch.tensor(sealed(row), dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(mine) for _ in present]
        begin = time.perf_counter()
        with self._explained(f"checksums of the {name}"):
            group.allgather([rows], [mine]).wait()
        self.traffic.seconds += time.perf_counter() - begin
        self.traffic.bytes_received += (len(rows) - 1) * mine.nbytes
        found = [unsealed(row.tolist()) for row in rows]
        lost = [i for i, row in zip(present, found, strict=True) if row is None]
        if lost:
            raise PeerError(
                f"{self.world.coordinator.describe(self.world.layout.rank)}: the checksums of particle {lost[0]} were "
                "damaged on the way; a link, a network card or memory is damaged: look for which, then restart from "
                "the last checkpoint"
            )
        return [row for row in found if row is not None]

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Name those who may have been lost where the collective in the block breaks."""
        try:
            yield
        except (torch.OutOfMemoryError, PeerError):  # a simulation knows who is missing
            raise
        except RuntimeError as error:
            layout, describe = self.world.layout, self.world.coordinator.describe
            peers = "; ".join(describe(rank) for rank in layout.peers if rank != layout.rank)
            raise PeerError(
                f"{describe(layout.rank)}: the {name} with its peers broke ({error}); one of these was lost or is "
                f"slower than swarm.timeout_s: {peers}. Look at their logs, then restart from the last checkpoint"
            ) from error
