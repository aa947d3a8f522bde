"""The cost of a sync point: its arithmetic agrees with itself, and with the bytes that are counted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import Pool

from ds_pso.config.cost_model import Cluster, Memory, memory, moments_kept, sync_cost
from ds_pso.config.load import load_config

CLUSTER = Cluster(parameters=7.5e6, particles=2, ranks=1, step_s=0.43, bandwidth=100e6)


def section(**keys: Any) -> Any:
    return load_config({"swarm": {"particles": 2, "total_steps": 640, **keys}})[1]


def test_an_example_by_hand() -> None:
    """7.5 million fp32 numbers, twice, half of it from the other one: 30 MB, 2.4 s at 100 Mbit/s."""
    found = sync_cost(CLUSTER, section(sync_interval=32))
    assert found.megabytes == pytest.approx(30)
    assert found.exchange_s == pytest.approx(2.4)
    assert found.compute_share == pytest.approx(32 * 0.43 / (32 * 0.43 + 2.4))
    late = sync_cost(CLUSTER, section(sync_interval=32, delay=5))
    assert late.held_up_s == pytest.approx(2.4 - 5 * 0.43)
    assert sync_cost(CLUSTER, section(sync_interval=32, delay=6)).compute_share == 1
    waits = sync_cost(replace(CLUSTER, latency_s=0.1), section())
    assert waits.exchange_s == pytest.approx(2.4 + 0.1 * (5 + 2))  # to sync, and round the ring
    assert sync_cost(CLUSTER, section(sync_mode="nosync", nosync={"asynchronous": True})).compute_share == 1


def test_moments_cost_their_share_of_each_sync_point() -> None:
    """Of 7.5 million: first ones every 3rd time, second ones every 6th, half of each from the other particle."""
    every = {"first_every": 3, "second_every": 6}
    found = sync_cost(CLUSTER, section(optimizer_state="average", moments=every))
    assert found.megabytes == pytest.approx(30 * (1 + 1 / 3 + 1 / 6))
    rounded = section(optimizer_state="average", moments={**every, "wire": "int8"})
    assert sync_cost(CLUSTER, rounded).megabytes == pytest.approx(30 + 7.5 * (1 + 1 / 64) * (1 / 3 + 1 / 6))
    assert sync_cost(CLUSTER, section(optimizer_state="average")).megabytes == pytest.approx(90)
    momentum = replace(CLUSTER, moments=(1, 0))
    assert sync_cost(momentum, rounded).megabytes == pytest.approx(30 + 7.5 * (1 + 1 / 64) / 3)
    assert sync_cost(CLUSTER, section()).megabytes == pytest.approx(30)
    assert memory(CLUSTER, rounded).kept == 8 * 7.5e6
    assert memory(momentum, rounded).kept == 4 * 7.5e6
    assert memory(CLUSTER, section(optimizer_state="average")).kept == 0


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        ({"type": "AdamW", "params": {"lr": 0.1}}, (1, 1)),
        ({"type": "SGD", "params": {"momentum": 0.9}}, (1, 0)),
        ({"type": "SGD"}, (0, 0)),
        ({"type": "Muon"}, (1, 0)),
        ({"type": "OneBitAdam"}, None),
        (None, None),
    ],
)
def test_the_moments_of_an_optimizer(optimizer: Any, kept: Any) -> None:
    assert moments_kept({} if optimizer is None else {"optimizer": optimizer}) == kept


def test_what_streams_meets_more_often_for_fewer_bytes() -> None:
    turns = {"streaming": True, "fragments": 4}
    found = sync_cost(CLUSTER, section(sync_interval=32, delay=2, **turns))
    part = sync_cost(replace(CLUSTER, parameters=7.5e6 / 4), section(sync_interval=8, delay=2))
    assert (found.megabytes, found.exchange_s) == (part.megabytes, part.exchange_s)
    assert found.compute_share == part.compute_share == 1
    slow = replace(CLUSTER, bandwidth=20e6)  # 3 s for a quarter, of which 0.86 are hidden
    late = sync_cost(slow, section(sync_interval=32, delay=2, **turns))
    assert late.held_up_s == pytest.approx(3 - 2 * 0.43)
    assert late.delay_for(0.999999) == math.ceil(3 / 0.43)
    assert late.interval_for(0.95) == 4 * math.ceil(19 * late.held_up_s / 0.43)
    assert late.slowdown_for(late.compute_share) == pytest.approx(1)


clusters = st.builds(
    Cluster,
    parameters=st.floats(1e5, 1e11),
    particles=st.integers(2, 64),
    ranks=st.sampled_from([1, 8]),
    step_s=st.floats(1e-3, 10),
    bandwidth=st.floats(1e6, 1e12),
    latency_s=st.sampled_from([0.0, 1e-4, 0.1]),
)
sections = st.builds(
    lambda mode, wire, interval, delay: section(
        sync_mode=mode, wire=wire, sync_interval=interval, delay=min(delay, interval)
    ),
    st.sampled_from(["local_sgd", "diloco", "easgd", "nosync", "pso"]),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.integers(1, 640),
    st.sampled_from([0, 1, 20]),
)


@given(clusters, sections, st.floats(0.5, 0.99))
def test_what_it_advises_is_enough_and_no_less_is(cluster, swarm, share):
    found = sync_cost(cluster, swarm)
    interval, delay, slowdown = found.interval_for(share), found.delay_for(share), found.slowdown_for(share)
    assert replace(found, interval=interval).compute_share >= share - 1e-6
    if interval > max(1, found.delay):
        assert replace(found, interval=interval - 1).compute_share < share + 1e-6
    assert replace(found, delay=delay).compute_share >= share - 1e-6
    if delay > 0:
        assert replace(found, delay=delay - 1).compute_share < share + 1e-6
    if slowdown > 0:
        assert replace(found, transfer_s=found.transfer_s * slowdown).compute_share == pytest.approx(share)
    else:
        assert replace(found, transfer_s=0.0).compute_share <= share + 1e-6


@given(clusters, sections)
def test_more_of_a_good_thing_never_hurts(cluster, swarm):
    share = sync_cost(cluster, swarm).compute_share
    assert sync_cost(replace(cluster, bandwidth=2 * cluster.bandwidth), swarm).compute_share >= share - 1e-9
    assert (
        sync_cost(cluster, swarm.model_copy(update={"sync_interval": 2 * swarm.sync_interval})).compute_share >= share
    )
    assert sync_cost(cluster, swarm, "int4").compute_share >= sync_cost(cluster, swarm, "int8").compute_share - 1e-9


SWARMS: list[dict[str, Any]] = [
    *({"sync_mode": "local_sgd", "wire": wire} for wire in ("fp32", "bf16", "int8", "int4")),
    {"sync_mode": "diloco"},
    {"sync_mode": "pso"},
    {"sync_mode": "pso", "wire": "int4"},
    {"sync_mode": "pso", "pso": {"topology": "ring"}},
    {"sync_mode": "noloco"},
    {"sync_mode": "line_search"},
    {"sync_mode": "swarm"},
    {"optimizer_state": "average"},
    {"optimizer_state": "average", "wire": "int4", "moments": {"wire": "int8"}},
]
OF_SGD = replace(CLUSTER, parameters=40_100, moments=(1, 0))


def each_simulated(sections: list[dict[str, Any]], particles: int, interval: int, life: Any) -> list[Any]:
    """``life(swarm, step)`` of each particle of each swarm of 40,100 parameters; ``step()`` makes an optimizer step."""
    import deepspeed

    import ds_pso

    def body(swarm: Any) -> Any:
        engine, *_ = deepspeed.initialize(model=torch.nn.Linear(400, 100), config=swarm.ds_config)
        swarm.attach(engine, probe=lambda index: torch.ones(()))

        def step() -> None:
            engine.backward(engine(torch.ones(1, 400)).mean())
            engine.step()

        return life(swarm, step)

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0, "momentum": 0.9}},
        "zero_allow_untested_optimizer": True,
    }
    common = {"particles": particles, "sync_interval": interval}
    return [ds_pso.simulate(config | {"swarm": common | section}, body) for section in sections]


def counted(particles: int) -> list[tuple[float, float]]:
    """(elements, mean bytes received by those that receive anything) at the second sync point of each swarm."""

    def life(swarm: Any, step: Any) -> float:
        step()
        before = swarm.totals.bytes_received
        step()
        return swarm.totals.bytes_received - before

    found = []
    for lives in each_simulated(SWARMS, particles, 1, life):
        received = [nbytes for nbytes in lives if nbytes > 1000]
        found.append((40_100, sum(received) / len(received)))
    return found


@pytest.mark.parametrize("particles", [2, 4])
def test_its_bytes_are_those_that_a_swarm_counts(pool: Pool, particles: int) -> None:
    (found,) = pool.run(counted, particles, world_size=1)
    for swarm_section, (numel, nbytes) in zip(SWARMS, found, strict=True):
        swarm = load_config({"swarm": {"particles": particles, **swarm_section}})[1]
        megabytes = sync_cost(replace(OF_SGD, parameters=numel, particles=particles), swarm).megabytes
        assert 1e6 * megabytes == pytest.approx(nbytes, rel=0.04), swarm_section  # but for numbers about the particles


KEEPS: list[dict[str, Any]] = [
    *SWARMS,
    {"sync_mode": "easgd"},
    {"sync_mode": "diloco", "state_dtype": "bf16"},
    {"sync_mode": "pso", "pso": {"inertia": 0.5, "cognitive": 0.5}, "state_dtype": "bf16"},
    {"sync_mode": "diloco", "wire": "int4", "state_dtype": "bf16", "delay": 1},
    {"sync_mode": "local_sgd", "delay": 1, "fragments": 4, "streaming": True},
    {"optimizer_state": "average", "moments": {"wire": "int4"}, "state_dtype": "bf16", "delay": 1},
]


def held(particles: int) -> list[tuple[int, int]]:
    """(bytes kept, bytes of what is pending) just after the first sync point of each swarm has begun."""

    def life(swarm: Any, step: Any) -> tuple[int, int]:
        for _ in range(swarm.steps_to_sync):
            step()
        synchronizer = swarm.session.synchronizer
        tensors = [t for state in synchronizer.parts.updater.state for t in state.values()]
        if synchronizer.parts.updater.differences:
            tensors += synchronizer.parts.updater.differences.common + synchronizer.parts.updater.differences.residual
        tensors += synchronizer.parts.moment_residuals()
        pending = synchronizer.overlap.pending
        late = [*pending.movement, *(moment.tensor for moment in pending.moments)] if pending else []
        return sum(t.nbytes for t in tensors), sum(t.nbytes for t in late)

    return [lives[0] for lives in each_simulated(KEEPS, particles, 4, life)]


def test_what_is_kept_takes_the_memory_it_says(pool: Pool) -> None:
    (found,) = pool.run(held, 2, world_size=1)
    for swarm_section, (kept, pending) in zip(KEEPS, found, strict=True):
        swarm = load_config({"swarm": {"particles": 2, "sync_interval": 4, **swarm_section}})[1]
        needed = memory(OF_SGD, swarm)
        assert (needed.kept, needed.pending) == (kept, pending), swarm_section


def test_what_sync_point_takes_is_bounded_by_the_bucket() -> None:
    whole = memory(CLUSTER, section(bucket_mb=4096))
    assert whole == Memory(kept=0, pending=0, exchange=4 * 7.5e6)
    assert memory(CLUSTER, section(bucket_mb=1)).exchange == 2**20
    shared = memory(replace(CLUSTER, ranks=4), section(bucket_mb=4096, wire="int4", delay=2, fragments=2))
    share = 7.5e6 / 4
    assert (shared.kept, shared.pending) == (8 * share, 4 * share)
    assert shared.exchange == pytest.approx(share * (4 + (1 / 2 + 1 / 64) * (2 - 1 / 2)))
    chunk = 4 + 64 * 14 / 8  # bytes: two sizes, and 64 of 4,096 elements
    sparse = memory(CLUSTER, section(bucket_mb=4096, wire="sparse", residual="weights"))
    assert sparse.kept == 4 * 7.5e6, "what all know; the residual is in the weights"
    # What is sent and then left, sums, the weights of those who sent, the residual; and what goes and comes.
    assert sparse.exchange == pytest.approx(4 * 7.5e6 * 4 + 7.5e6 / 4096 * chunk * (1 + 2))
    turns = {"streaming": True, "fragments": 8, "delay": 1, "sync_interval": 8}
    for ranks, most in ((1, 7.5e6 / 8), (4, 7.5e6 / 8), (16, share / 4)):
        in_turns = memory(replace(CLUSTER, ranks=ranks), section(bucket_mb=4096, **turns))
        assert (in_turns.pending, in_turns.exchange) == (4 * most, 4 * most), "a whole fragment, or the whole shard"
    messages = memory(CLUSTER, section(sync_mode="nosync", nosync={"asynchronous": True}))
    assert messages == Memory(kept=7.5e6 * 4 * 3, pending=0, exchange=0)


def test_a_sparse_mean_grows_with_the_particles():
    """Each hears from every other one."""
    for particles in (2, 4, 17):
        cluster = replace(CLUSTER, particles=particles)
        swarm = load_config({"swarm": {"particles": particles, "wire": "sparse", "sparse": {"density": 1 / 128}}})[1]
        assert sync_cost(cluster, swarm).megabytes * 1e6 == pytest.approx(
            (particles - 1) * (4 + 32 * 14 / 8) / 4096 * cluster.parameters
        )
