"""A sync that comes to nothing leaves nothing behind; and a particle that recovers has all that the donor has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from integration.jobs import Case, Net, assert_equal, build_engine, config, parameter_groups, train, working_weights
from pool import Pool

import ds_pso
from ds_pso.distributed.membership import Quorum
from ds_pso.errors import PeerError
from ds_pso.swarm import Swarm
from ds_pso.sync.parts import SyncParts
from ds_pso.sync.rollback import residuals, shared_state

Arrays = dict[str, np.ndarray]
CASE = Case(stage=0, sync_mode="diloco", steps=2, batch_norm=True, seed=1)


class Lossy:
    """The membership of a simulated particle, as if a peer were lost: the first vote that counts says no.

    Args:
        quorum: instead of the one of all.
        shared: by all particles, what they let the others read.
    """

    can_fail = True

    def __init__(
        self,
        parts: SyncParts,
        look: Callable[[], None] = lambda: None,
        *,
        fails: bool = False,
        quorum: Quorum | None = None,
        shared: dict[str, Any] | None = None,
    ) -> None:
        self._real, self._look, self._fails = parts.membership, look, fails
        self._quorum, self._shared = quorum, shared if shared is not None else {}
        parts.membership = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def start_quorum(self, index: int, *, in_background: bool = False) -> Quorum:
        self._look()
        found = self._real.start_quorum(index, in_background=in_background)
        return self._quorum or found

    def should_commit(self, error: PeerError | None) -> bool:
        assert error is None
        self._look()
        fails, self._fails = self._fails, False
        return not fails

    def share(self, key: str, value: Any) -> None:
        self._shared[key] = value

    def receive(self, key: str) -> Any:
        return self._shared[key]


def copied(parts: SyncParts) -> Arrays:
    """All that a sync may change, flat."""
    updater, shards = parts.updater, parts.shards
    found = {
        "weights": shards.tensors,
        "buffers": [buffer for _, buffer in shards.buffers()],
        "moments": shards.moments(),
        "residual": [*residuals(updater), *parts.moment_residuals()],
        "state of rule and wire": shared_state(updater),
    }
    nothing = torch.zeros(0)
    return {name: torch.cat([nothing, *(t.flatten() for t in tensors)]).numpy() for name, tensors in found.items()}


def sync_in_vain(case: Case) -> list[Any]:
    def live(swarm: Swarm) -> Any:
        engine = swarm.attach(build_engine(case, swarm.ds_config))
        synchronizer = swarm.session.synchronizer
        assert synchronizer is not None
        parts, seen = synchronizer.parts, list[tuple[Arrays, Any]]()
        where = (swarm.particle, 0, 1)
        # One sync that goes well first: until then there is no residual, and no state of rule and wire.
        train(case, engine, range(case.steps), where=where)
        swarm.finish_pending()

        def look() -> None:
            numbers = synchronizer.state_dict() | {"pending": None}
            seen.append((copied(parts), (numbers, swarm.session.window.state())))

        Lossy(parts, look, fails=True)
        train(case, engine, range(case.steps, 2 * case.steps), where=where)
        look()
        return seen[:3]

    return ds_pso.simulate(config(case, 1), live)


@pytest.mark.parametrize(
    ("swarm", "changed"),
    [
        ({"optimizer_state": "average"}, {"weights", "buffers", "moments", "state of rule and wire"}),
        (
            {"optimizer_state": "average", "moments": {"wire": "int8"}},
            {"weights", "buffers", "moments", "residual", "state of rule and wire"},
        ),
        (
            {"optimizer_state": "average", "moments": {"wire": "int8"}, "delay": 1},
            {"residual", "state of rule and wire"},
        ),
        ({"wire": "int4"}, {"weights", "buffers", "residual", "state of rule and wire"}),
        ({"wire": "int4", "delay": 1}, {"residual", "state of rule and wire"}),
    ],
    ids=["moments", "rounded moments", "moments in the background", "wire", "in the background"],
)
def test_what_a_sync_in_vain_has_changed_is_put_back(pool: Pool, swarm: dict[str, Any], changed: set[str]) -> None:
    """Bit for bit: before it, in the moment of the vote, and after it."""
    case = replace(CASE, swarm=swarm)
    (particles,) = pool.run(sync_in_vain, case, world_size=1)
    for (before, numbers), (meanwhile, _), (after, numbers_after) in particles:
        assert_equal(after, before)
        assert {name for name in before if not np.array_equal(before[name], meanwhile[name])} == changed
        if "delay" not in swarm:
            assert numbers_after == numbers


def frozen_net(case: Case) -> tuple[Net, list[dict[str, Any]]]:
    """A model of which the first layer is not trained."""
    net = Net(case.batch_norm)
    net.first.requires_grad_(False)
    groups = [{"params": [p for p in group["params"] if p.requires_grad]} for group in parameter_groups(case, net)]
    return net, groups


def recover_one(case: Case) -> list[Any]:
    shared: dict[str, Any] = {}

    def live(swarm: Swarm) -> Any:
        net, groups = frozen_net(case)
        engine, *_ = deepspeed.initialize(model=net, model_parameters=groups, config=swarm.ds_config)
        swarm.attach(engine)
        synchronizer = swarm.session.synchronizer
        assert synchronizer is not None
        train(case, engine, where=(swarm.particle, 0, 1))
        parts = synchronizer.parts
        if swarm.particle == 1:  # as a process that has been started again
            with torch.no_grad():
                for tensor in (*net.parameters(), net.norm.running_mean, *parts.shards.tensors):
                    tensor.add_(1.0)
                for tensor in (*shared_state(parts.updater), *residuals(parts.updater)):
                    tensor.add_(1.0)
        Lossy(parts, quorum=Quorum((0, 1), recovering=(1,), sources=(0, 0)), shared=shared)
        before = copied(parts) | working_weights(engine)
        swarm.sync()
        assert swarm.last_sync is not None
        return before, copied(parts) | working_weights(engine), swarm.last_sync

    return ds_pso.simulate(config(case, 1), live)


def test_who_recovers_has_all_that_the_donor_has(pool: Pool) -> None:
    """Also what is not trained, and the state of rule and wire; and what it had before counts nowhere."""
    case = replace(CASE, swarm={"wire": "int8"})
    ((donor, recovered),) = pool.run(recover_one, case, world_size=1)
    before, after, record = donor
    others, found, of_recovered = recovered
    assert record.alive == of_recovered.alive == (True, False)
    # What a recovery moves is no traffic of the sync after it.
    assert of_recovered.bytes_received == record.bytes_received > 0
    for name in ("first.weight", "first.bias", "weights", "buffers", "state of rule and wire"):
        assert np.any(before[name] != others[name])
        np.testing.assert_array_equal(found[name], after[name], err_msg=name)
    assert not found["residual"].any(), "it was of differences that nobody has sent"
    assert not found["moments"].any()
