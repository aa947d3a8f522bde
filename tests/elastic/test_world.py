"""How long a rank waits for the first one of its particle."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ds_pso.distributed.layout import Layout
from ds_pso.elastic.world import _SIGNS, ElasticWorld
from ds_pso.errors import PeerError


@pytest.mark.parametrize("lives_for", [0, 3])
def test_a_mate_waits_as_long_as_the_first_rank_asks(monkeypatch: pytest.MonkeyPatch, lives_for: int) -> None:
    """Who joins waits until the others come by; the first rank says all the while that it lives."""
    world = ElasticWorld.__new__(ElasticWorld)
    world.store, world.layout = dist.HashStore(), Layout(1, 2, 1)
    waits = []

    def in_vain(keys: list[str], ranks: list[int], label: str) -> None:
        waits.append((keys, ranks))
        if len(waits) > lives_for:
            raise PeerError("nobody came")
        world.store.add(_SIGNS, 1)
        raise PeerError("not yet")

    monkeypatch.setattr(world, "_wait_patiently", in_vain)
    with pytest.raises(PeerError, match="nobody came"):
        world._wait_while_it_asks(["key"])
    assert waits == [(["key"], [0])] * (lives_for + 1)
