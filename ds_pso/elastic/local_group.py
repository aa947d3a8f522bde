"""The ranks of one particle of an elastic swarm, talking over the particle's store.

Not over torch's process group: a rank that has lost its peers must be able to say so to those that wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar

from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.errors import PeerError

_SIGNS = "leader/signs"  # a number that grows while the first rank asks the lighthouse

Answer = TypeVar("Answer")


class _Row(TypedDict, total=False):
    """A rank's word of one turn: one of the two."""

    values: list[float]
    failed: str


class LocalRankFailed(PeerError):
    """A rank of this particle has failed in an exchange, and all of them know."""


class StoreLocalGroup:
    """A ``LocalGroup`` in which a rank may fail instead of coming.

    Args:
        patience_s: how long others may be waiting for their peers, each for its own.
    """

    def __init__(self, coordinator: StoreCoordinator, patience_s: float) -> None:
        self._coordinator = coordinator
        self._patience_s = patience_s
        self._answers: list[str] = []  # keys of what the first rank has said
        self._turn = 0
        self._row = ""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return a few float64 of every rank of this particle, exactly, in the order of ranks.

        Raises:
            LocalRankFailed: one has failed instead.
        """
        self._post({"values": list(values)})
        rows = self._read()
        failed = next((row["failed"] for row in rows if "failed" in row), None)
        if failed is not None:
            raise LocalRankFailed(failed)
        return [row["values"] for row in rows]

    def fail(self, error: PeerError) -> None:
        """Say to the others, instead of gathering, that this rank has failed; nothing if that is known."""
        if not isinstance(error, LocalRankFailed):
            self._post({"failed": str(error)})

    def _post(self, row: _Row) -> None:
        """Say one thing a turn, whether this rank gets on or fails."""
        coordinator = self._coordinator
        coordinator.background.settle()
        assert coordinator.store is not None
        self._turn = coordinator.turn("row")
        self._row = f"row/{self._turn}"
        coordinator.store.set(f"{self._row}/{coordinator.layout.shard_rank}", json.dumps(row))

    def _read(self) -> list[_Row]:
        coordinator, store = self._coordinator, self._coordinator.store
        assert store is not None
        ranks = coordinator.layout.local_ranks
        keys = [f"{self._row}/{rank}" for rank in range(len(ranks))]
        coordinator.wait(keys, ranks, "its particle at a sync point", self._patience_s)
        rows: list[_Row] = [json.loads(row) for row in store.multi_get(keys)]
        if self._turn > 0:  # who has come here has read the one before, and all answers
            store.delete_key(f"row/{self._turn - 1}/{coordinator.layout.shard_rank}")
        while self._answers:
            store.delete_key(self._answers.pop())
        return rows

    def sign(self) -> None:
        """Say, in the first rank, that it is still asking."""
        assert self._coordinator.store is not None
        self._coordinator.store.add(_SIGNS, 1)

    def from_leader(self, label: str, question: Callable[[], Answer]) -> Answer:
        """Return on all ranks of the particle what the first one answers; its errors, too.

        Args:
            question: called in the first rank; returns JSON values.
        """
        coordinator, store = self._coordinator, self._coordinator.store
        assert store is not None
        key = f"leader/{label}/{coordinator.turn(label)}"
        if coordinator.is_leader:
            try:
                answer = {"answer": question()}
            except Exception as error:
                store.set(key, json.dumps({"failed": str(error)}))
                raise
            store.set(key, json.dumps(answer))
            self._answers.append(key)
        self._wait_while_it_asks(key)
        found = json.loads(store.get(key))
        if "failed" in found:
            raise PeerError(found["failed"], agreed=True)
        said: Answer = found["answer"]
        return said

    def _wait_while_it_asks(self, key: str) -> None:
        """Wait for the first rank, which waits without bound where the others have to come by first; while it lives."""
        coordinator, store = self._coordinator, self._coordinator.store
        assert store is not None
        ranks = coordinator.layout.local_ranks[:1]
        while True:
            signs = store.add(_SIGNS, 0)
            try:
                return coordinator.wait([key], ranks, "word from its first rank", self._patience_s)
            except PeerError:
                if store.add(_SIGNS, 0) == signs:
                    raise
