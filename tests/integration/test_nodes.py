"""Several machines, as far as one can play them: ranks that give different host names."""

import socket
from pathlib import Path

import pytest
import torch

import ds_pso
from ds_pso.distributed.static_world import carve

from .jobs import Case, config, swarm_of, train


def pretend_nodes(ranks_per_node):
    import os

    node = int(os.environ["LOCAL_RANK"]) // ranks_per_node
    socket.gethostname = lambda: f"node-{node}"
    return node


def save_from_two_nodes(folder, own_disks):
    node = pretend_nodes(2)
    target = Path(folder) / (f"disk-{node}" if own_disks else "shared")
    with swarm_of(Case(steps=4)) as (swarm, engine):
        for _ in range(2):  # the second save replaces the first one of the same step
            swarm.save(target)
        train(Case(steps=2), engine)
        swarm.save(target)
        saved = engine.global_steps
        step = swarm.load(target)
        return saved, step, sorted(path.name for path in target.iterdir())


@pytest.mark.parametrize("own_disks", [False, True])
def test_nodes_save_to_a_shared_disk_and_to_their_own(pool, tmp_path, own_disks):
    for saved, step, names in pool.run(save_from_two_nodes, tmp_path, own_disks):
        assert saved == step == 2
        assert names == ["latest", "step_00000000", "step_00000002"]


def who_leads(folder, ranks_per_node, own_disks):
    node = pretend_nodes(ranks_per_node)
    world = carve(2, timeout_s=20)
    leads = [world.coordinator.leads_disk(Path(folder) / (f"{node}" if own_disks else "shared")) for _ in range(2)]
    world.close()
    return leads


@pytest.mark.parametrize(
    ("ranks_per_node", "own_disks", "leaders"), [(2, False, [0]), (2, True, [0, 2]), (4, False, [0]), (1, False, [0])]
)
def test_one_rank_leads_each_disk(pool, tmp_path, ranks_per_node, own_disks, leaders):
    results = pool.run(who_leads, tmp_path, ranks_per_node, own_disks)
    assert [rank for rank, leads in enumerate(results) if leads == [True, True]] == leaders
    assert [rank for rank, leads in enumerate(results) if leads == [False, False]] == sorted({0, 1, 2, 3} - {*leaders})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "marks must go"


def particles_of_nodes():
    pretend_nodes(2)
    with ds_pso.init(config(Case(particles="node"), 2)) as swarm:
        return (
            swarm.num_particles,
            swarm.world.coordinator.describe(3),
            len(swarm.world.coordinator.local_ranks_on_this_node),
        )


def test_each_node_is_a_particle(pool):
    results = pool.run(particles_of_nodes, env={"LOCAL_WORLD_SIZE": "2"})
    assert results == [(2, "particle 1, rank 1 (rank 3 on host node-1)", 2)] * 4


def two_swarms_in_one_job():
    """Without a launcher's agent the second store is new; with one it keeps the first one's keys."""
    seen = []
    for turn in range(2):
        with ds_pso.init(config(Case(), 2)) as swarm:
            seen.append(swarm.world.coordinator.gather("turn", [turn, swarm.particle]))
            torch.distributed.init_process_group("gloo")  # as DeepSpeed does, in the particle's environment
            seen.append(swarm.gather(float(turn + swarm.particle)))
    return seen, torch.distributed.is_initialized()


def test_a_second_swarm_does_not_read_the_keys_of_the_first(pool):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
    for env in ({}, agent):
        for seen, still_up in pool.run(two_swarms_in_one_job, env=env):
            assert (seen[1], seen[3]) == ([0.0, 1.0], [1.0, 2.0])
            assert seen[0] == [[0, 0], [0, 0], [0, 1], [0, 1]]
            assert seen[2] == [[1, 0], [1, 0], [1, 1], [1, 1]]
            assert still_up, "it is the script's now"
