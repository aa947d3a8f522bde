"""One collective of a peer group after the other: timed, counted, checked if wanted, and explained where it fails."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ds_pso.distributed.world import World
from ds_pso.errors import PeerError
from ds_pso.utils.checksums import TRIES, Moved, sealed, unsealed


@dataclass(frozen=True)
class Traffic:
    """Sums over all collectives of a rank so far.

    Attributes:
        bytes_received: by this rank.
        seconds: inside collectives, waiting included.
        repeated: collectives that were damaged on the way.
    """

    bytes_received: int
    seconds: float
    repeated: int


class Collectives:
    """What an exchange is made of.

    Attributes:
        device: where the tensors lie that are moved.
        bytes_received: by this rank.
        seconds: inside collectives, waiting included.
        repeated: collectives that were damaged on the way.
    """

    def __init__(self, world: World, *, checksums: bool = False) -> None:
        self.world = world
        self.checksums = checksums
        self.device = world.peers.device
        self.bytes_received = 0
        self.seconds = 0.0
        self.repeated = 0

    def traffic(self) -> Traffic:
        """Return the sums so far."""
        return Traffic(self.bytes_received, self.seconds, self.repeated)

    def count(self, received: int) -> None:
        """Count bytes that came on another way."""
        self.bytes_received += received

    @property
    def num_particles(self) -> int:
        return self.world.layout.num_particles

    @property
    def particle(self) -> int:
        return self.world.layout.particle

    @property
    def present(self) -> Sequence[int]:
        """The particles of the peer group, in its order."""
        return self.world.peers.present

    def _run(self, what: str, start: Any, received: float, prepare: Callable[[], Moved | None]) -> None:
        """A collective, and again if it was damaged on the way.

        Args:
            what: its name.
            start: begins it on a process group.
            received: bytes, by this rank.
            prepare: called before each try, says what will be moved.

        Raises:
            PeerError: a peer was lost or is too slow, or the link damages whatever is sent.
        """
        if self.world.peers.group is None:
            assert len(self.present) == 1, "others are there, and no connections to them"
            prepare()
            return
        for count in range(1, TRIES + 1):
            moved = prepare()
            self._collect(what, start, received)
            if not self.checksums or moved is None:
                return
            damage = moved.damage(self._tell(what, moved.row()))
            if not damage:
                return
            me = self.world.coordinator.describe(self.world.layout.rank)
            if count == TRIES:
                raise PeerError(
                    f"{me}: {damage} did not arrive as it was sent, {TRIES} times in a row (the {what} with its "
                    "peers); a link, a network card or memory is damaged: look for which, then restart from the last "
                    "checkpoint"
                )
            self.repeated += 1
            if self.particle == self.present[0]:  # one of those who all know it
                warnings.warn(
                    f"{me}: {damage} did not arrive as it was sent; the {what} is repeated ({count} of {TRIES - 1})",
                    stacklevel=2,
                )

    def _who(self) -> str:
        return self.world.coordinator.describe(self.world.layout.rank)

    def _tell(self, what: str, row: list[int]) -> list[list[int]]:
        """The checksums of all peers. Where these are damaged, too, nobody could tell who goes on and who repeats."""
        mine = torch.tensor(sealed(row), dtype=torch.int64, device=self.device)
        rows = [torch.empty_like(mine) for _ in self.present]
        self._collect(
            f"checksums of the {what}",
            lambda group: group.allgather([rows], [mine]),
            (len(rows) - 1) * nbytes(mine),
        )
        found = [unsealed(row.tolist()) for row in rows]
        lost = [i for i, row in zip(self.present, found, strict=True) if row is None]
        if lost:
            raise PeerError(
                f"{self._who()}: the checksums of particle {lost[0]} were damaged on the way;"
                " a link, a network card or memory is damaged: look for which, then restart from the last "
                "checkpoint"
            )
        return [row for row in found if row is not None]

    def _collect(self, what: str, start: Any, received: float) -> None:
        group = self.world.peers.group
        self.world.background.settle()
        begin = time.perf_counter()
        try:
            work = start(group)
            if self.device.type == "cuda":
                # Blocks, unlike NCCL's wait without a timeout.
                work.wait(timedelta(seconds=self.world.coordinator.timeout_s))
                torch.cuda.current_stream().synchronize()
            else:
                work.wait()
        except (torch.OutOfMemoryError, PeerError):  # a simulation knows who is missing
            raise
        except RuntimeError as error:
            layout = self.world.layout
            peers = "; ".join(self.world.coordinator.describe(rank) for rank in layout.peers if rank != layout.rank)
            raise PeerError(
                f"{self._who()}: the {what} with its peers broke ({error}); one of these was lost"
                f" or is slower than swarm.timeout_s: {peers}. Look at their logs, then restart "
                "from the last checkpoint"
            ) from error
        self.seconds += time.perf_counter() - begin
        self.bytes_received += round(received)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
