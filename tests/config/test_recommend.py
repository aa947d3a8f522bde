"""What is recommended for a link: enough for it, and no shorter interval is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.config.cost_model import Cluster, sync_cost
from ds_pso.config.load import load_config
from ds_pso.config.recommend import INTERVALS, WIRES, Planner

CLUSTER = Cluster(parameters=7.5e6, particles=2, ranks=1, step_s=0.43, bandwidth=100e6)
TWO = {"particles": 2}


def planner(cluster: Cluster = CLUSTER, section: dict[str, Any] = TWO, **config: Any) -> Planner:
    return Planner(cluster, {"zero_optimization": {"stage": 2}, **config}, section, "nccl")


clusters = st.builds(
    Cluster,
    parameters=st.floats(1e5, 1e11),
    particles=st.integers(2, 64),
    ranks=st.sampled_from([1, 8]),
    step_s=st.floats(1e-2, 10),
    bandwidth=st.floats(1e6, 1e12),
    latency_s=st.sampled_from([0.0, 1e-4, 0.1]),
)


@settings(max_examples=40)
@given(clusters, st.floats(0.5, 0.99))
def test_it_is_valid_enough_and_the_shortest(cluster: Cluster, share: float) -> None:
    found = planner(cluster)
    best, is_enough = found.recommend(share)
    config = {"zero_optimization": {"stage": 2}, **best.changes, "swarm": dict(best.section)}
    swarm = load_config(config)[1]
    assert is_enough == (best.cost.compute_share >= share)
    if best.is_synchronous:
        assert is_enough
        return
    assert sync_cost(cluster, swarm) == best.cost, "the section is what was computed"
    shorter = [n for n in INTERVALS if n < swarm.sync_interval]
    options = [*found.every_step(), *(found.syncing(n, wire) for n in shorter for wire in WIRES if wire != "sparse")]
    assert all(option is None or option.cost.compute_share < share for option in options)
    if is_enough and swarm.delay:
        same = [found.syncing(swarm.sync_interval, wire) for wire in WIRES[: 3 if swarm.sync_interval >= 4 else 2]]
        assert all(option is None or option.cost.compute_share < share for option in same), "no delay was needed"


@settings(max_examples=20)
@given(clusters)
def test_a_faster_link_never_asks_for_a_longer_interval(cluster: Cluster) -> None:
    def interval(bandwidth: float) -> float:
        best, is_enough = planner(replace(cluster, bandwidth=bandwidth)).recommend(0.95)
        return (0 if best.is_synchronous else best.cost.interval) if is_enough else float("inf")

    assert interval(2 * cluster.bandwidth) <= interval(cluster.bandwidth)


def recommended(bandwidth: float, **config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    best, is_enough = planner(replace(CLUSTER, bandwidth=bandwidth), **config).recommend(0.95)
    assert is_enough
    return dict(best.section), dict(best.changes)


def test_from_a_fast_link_to_a_slow_one() -> None:
    """7.5 M parameters and 0.43 s: by hand, 45 MB at every step take 15.9 Gbit/s, and 30 MB 10.6 Gbit/s."""
    common = {"particles": 2, "sync_mode": "local_sgd"}
    assert recommended(16e9) == ({"sync_mode": "allreduce"}, {})
    assert recommended(11e9) == ({"sync_mode": "allreduce"}, {"communication_data_type": "bf16"})
    assert recommended(2e9)[0] == common | {"sync_interval": 1, "wire": "int4"}
    assert recommended(300e6)[0] == common | {"sync_interval": 4, "wire": "sparse"}
    assert recommended(400e6)[0] == common | {"sync_interval": 4, "wire": "int4"}


def test_muon_leaves_what_is_not_sent_in_the_weights_and_may_sync_at_every_step() -> None:
    section, _ = recommended(100e6, optimizer={"type": "Muon"})
    assert section == TWO | {"sync_mode": "local_sgd", "sync_interval": 1, "wire": "sparse", "residual": "weights"}


def test_overlap_where_nothing_else_is_enough() -> None:
    """Messages of 0.2 s take longer than a step, whatever is in them; or the bytes of int4 have to be hidden."""
    far = planner(replace(CLUSTER, latency_s=0.2)).recommend(0.95)[0]
    assert far.section == TWO | {"sync_mode": "local_sgd", "sync_interval": 16, "wire": "int4", "delay": 4}
    large = Cluster(1.2e9, 4, 8, 0.6, 1e9, 0.02)
    in_turns = planner(large, {"particles": 4}).recommend(0.95)[0].section
    overlap = {"delay": 4, "streaming": True, "fragments": 4}
    assert in_turns == {"particles": 4, "sync_mode": "local_sgd", "sync_interval": 32, "wire": "int4"} | overlap


def test_what_the_section_says_stays_but_for_what_is_recommended() -> None:
    section = {
        "particles": 2,
        "sync_mode": "delayed",
        "sync_interval": 16,
        "wire": "int8",
        "state_dtype": "bf16",
        "bucket_mb": 32.0,
        "sparse": {"bits": 1},
    }
    best, _ = planner(section=section).recommend(0.95)
    kept = {"particles": 2, "sync_mode": "local_sgd", "bucket_mb": 32.0, "sparse": {"bits": 1}}
    assert dict(best.section) == kept | {"sync_interval": 4, "wire": "sparse"}


def test_modes_that_exclude_a_wire_or_a_delay() -> None:
    ring = planner(section={"particles": 2, "sync_mode": "pso", "pso": {"topology": "ring"}})
    assert ring.shortest_intervals(0.95).keys() == {"fp32"}
    assert ring.recommend(0.95)[0].section["wire"] == "fp32"
    searched = planner(section={"particles": 2, "sync_mode": "line_search"})
    assert searched.shortest_intervals(0.95).keys() == {"fp32", "int4"}
    assert "delay" not in searched.recommend(0.95)[0].section


def test_if_nothing_is_enough_it_is_what_leaves_most() -> None:
    crawling = planner(replace(CLUSTER, bandwidth=1e3))
    best, is_enough = crawling.recommend(0.95)
    assert not is_enough
    assert best.section["sync_interval"] == INTERVALS[-1]
    assert best.cost.compute_share == max(
        option.cost.compute_share for wire in WIRES if (option := crawling.syncing(INTERVALS[-1], wire)) is not None
    )


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_shortest_intervals_are_enough_and_no_shorter_ones_are(share: float) -> None:
    found = planner()
    for wire, interval in found.shortest_intervals(share).items():
        option = found.syncing(interval, wire)
        assert option is not None
        assert option.cost.compute_share >= share
        shorter = found.syncing(interval - 1, wire) if interval > (4 if wire == "sparse" else 1) else None
        assert shorter is None or shorter.cost.compute_share < share
