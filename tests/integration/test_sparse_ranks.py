"""The wire ``sparse`` and Muon on real ranks: each sync against its equations, on the shard of every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from comm.test_sparse import Oracle
from pool import Pool
from variants import slow_but

from ds_pso.comm.compression.sparse_options import SparseOptions

from .jobs import Case, swarm_of, train

KEPT = SparseOptions(density=1e-9)  # 8 of the elements of a rank, which has about 35
ROUNDED = 1e-3  # a mean that is rounded to bf16 may fall on either side; steps are 0.05
SCALARS = 14 * 8  # bytes of a peer's report, and of how far it was


@dataclass
class Sync:
    """Of one rank, flat."""

    brought: np.ndarray
    known: np.ndarray  # by all, before
    left_with: np.ndarray
    agreed: np.ndarray  # known by all, after
    nbytes: int


def syncs_of(case: Case) -> list[Sync]:
    """Those of this rank."""
    found: list[Sync] = []
    with swarm_of(case) as (swarm, engine):
        synchronizer = swarm.session.synchronizer
        parts, real = synchronizer.parts, synchronizer.sync

        def flat(tensors: Any) -> np.ndarray:
            return np.concatenate([t.detach().float().numpy().ravel() for t in tensors])

        def sync(*arguments: Any) -> Any:
            parts.shards.zero_padding()
            common = parts.updater.differences.common
            before = flat(parts.shards.tensors), flat(common)
            record = real(*arguments)
            found.append(Sync(*before, flat(parts.shards.tensors), flat(common), record.bytes_received))
            return record

        synchronizer.sync = sync
        train(case, engine)
    return found


@pytest.mark.parametrize(
    ("stage", "optimizer", "residual"),
    slow_but(
        [(2, "Muon", "weights"), (3, "AdamW", "wire")],
        [(s, o, r) for s in (0, 1, 2, 3) for o in ("AdamW", "Muon") for r in ("wire", "weights")],
    ),
)
def test_every_sync_is_that_of_the_equations(pool: Pool, stage: int, optimizer: str, residual: str) -> None:
    swarm = {"wire": "sparse", "residual": residual, "sparse": {"density": KEPT.density}}
    momentum = 0.9 if optimizer == "Muon" else 0.0
    case = Case(stage=stage, optimizer=optimizer, momentum=momentum, interval=2, steps=8, swarm=swarm)
    ranks = pool.run(syncs_of, case)
    for mine, theirs in zip(ranks[:2], ranks[2:], strict=True):
        numel = len(mine[0].brought)
        oracle = Oracle(2, KEPT, 1.0, in_weights=residual == "weights", numel=numel)
        for pair in zip(mine, theirs, strict=True):
            assert (pair[0].brought != pair[1].brought).any(), "they learned the same"
            oracle.common = pair[0].known.astype(np.float64)
            expected = oracle.sync([sync.brought.astype(np.float64) for sync in pair], [True, True], 1.0)
            for sync, x in zip(pair, expected, strict=True):
                np.testing.assert_allclose(sync.agreed, oracle.common, rtol=0, atol=ROUNDED)
                np.testing.assert_allclose(sync.left_with, x, rtol=0, atol=ROUNDED)
                assert sync.nbytes == KEPT.chunk_bytes + SCALARS, "one chunk, of the one peer"
            np.testing.assert_array_equal(pair[0].agreed, pair[1].agreed)
