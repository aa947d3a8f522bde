"""The arithmetic of the launcher's world: who is in which particle, and what the environment must say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.distributed.layout import Layout, read_layout
from ds_pso.distributed.static_world import carve
from ds_pso.errors import ConfigError, SwarmError

relaxed = settings(deadline=None)


def environment(rank: int, world_size: int, **more: str | None) -> dict[str, str]:
    """What a launcher sets; a value of None takes the name out."""
    env = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", **more}
    return {name: value for name, value in env.items() if value is not None}


# -- layout ---------------------------------------------------------------------------------

layouts = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.builds(
        Layout,
        rank=st.integers(0, shape[0] * shape[1] - 1),
        world_size=st.just(shape[0] * shape[1]),
        num_particles=st.just(shape[0]),
    )
)


def everybody(layout: Layout) -> list[Layout]:
    return [Layout(rank, layout.world_size, layout.num_particles) for rank in range(layout.world_size)]


@relaxed
@given(layouts)
def test_rank_is_particle_and_shard_rank(layout):
    assert layout.rank == layout.particle * layout.particle_size + layout.shard_rank
    assert 0 <= layout.particle < layout.num_particles
    assert 0 <= layout.shard_rank < layout.particle_size
    assert layout.num_particles * layout.particle_size == layout.world_size


@relaxed
@given(layouts)
def test_peers_and_local_ranks_each_partition_the_ranks(layout):
    for groups in ({tuple(x.peers) for x in everybody(layout)}, {tuple(x.local_ranks) for x in everybody(layout)}):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


@relaxed
@given(layouts)
def test_peers_hold_the_same_shard_in_the_order_of_particles(layout):
    peers = [everybody(layout)[rank] for rank in layout.peers]
    assert [peer.particle for peer in peers] == list(range(layout.num_particles))
    assert {peer.shard_rank for peer in peers} == {layout.shard_rank}
    assert layout.peers[layout.particle] == layout.rank


@relaxed
@given(layouts)
def test_local_ranks_share_a_particle_in_the_order_of_shards(layout):
    local_ranks = [everybody(layout)[rank] for rank in layout.local_ranks]
    assert [mate.shard_rank for mate in local_ranks] == list(range(layout.particle_size))
    assert {mate.particle for mate in local_ranks} == {layout.particle}
    assert layout.local_ranks[layout.shard_rank] == layout.rank
    assert set(layout.peers) & set(layout.local_ranks) == {layout.rank}


# -- from the environment -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("particles", "env", "layout"),
    [
        (1, {}, Layout(0, 1, 1)),  # plain python
        ("node", {}, Layout(0, 1, 1)),
        (2, environment(3, 4), Layout(3, 4, 2)),
        (4, environment(3, 4), Layout(3, 4, 4)),
        ("node", environment(5, 8, LOCAL_WORLD_SIZE="4"), Layout(5, 8, 2)),  # torchrun, accelerate
        ("node", environment(5, 8, LOCAL_SIZE="4"), Layout(5, 8, 2)),  # deepspeed
        ("node", environment(5, 8, LOCAL_WORLD_SIZE="2", LOCAL_SIZE="8"), Layout(5, 8, 4)),
        ("node", environment(5, 8, LOCAL_WORLD_SIZE="8"), Layout(5, 8, 1)),
        (2, environment(5, 8, LOCAL_WORLD_SIZE="8"), Layout(5, 8, 2)),  # particles need not be nodes
        (2, environment(3, 4, SLURM_NTASKS="2", SLURM_PROCID="1"), Layout(3, 4, 2)),  # torchrun under srun
        (1, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Layout(0, 1, 1)),
        (1, {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, Layout(0, 1, 1)),  # srun -n 1 in a job of 8
    ],
)
def test_layout_from_the_environment(particles, env, layout):
    assert read_layout(particles, env) == layout


@pytest.mark.parametrize(
    ("particles", "env", "said"),
    [
        (
            3,
            environment(0, 4),
            "swarm.particles = 3: does not divide the 4 ranks that were started; use one of 1, 2, 4",
        ),
        (8, environment(0, 12), "use one of 1, 2, 3, 4, 6, 12, or start another number of ranks"),
        (2, {}, "swarm.particles = 2: does not divide the 1 ranks"),
        ("node", environment(0, 6, LOCAL_WORLD_SIZE="4"), 'swarm.particles = "node": 6 ranks do not split into nodes'),
        ("node", environment(0, 4, LOCAL_WORLD_SIZE="8"), "4 ranks do not split into nodes of 8"),
        ("node", environment(0, 4, LOCAL_WORLD_SIZE="0"), "4 ranks do not split into nodes of 0"),
        ("node", environment(0, 4, LOCAL_WORLD_SIZE="-2"), "4 ranks do not split into nodes of -2"),
        ("node", environment(0, 4, LOCAL_SIZE="two"), "LOCAL_SIZE = 'two': must be a whole number"),
        ("node", environment(0, 4), "LOCAL_WORLD_SIZE is not set"),  # nothing says where a node ends
        (2, {"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE = 4, but RANK and WORLD_SIZE are not set"),
        (2, {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS = 4, but RANK and WORLD_SIZE are not set"),
        (1, {"SLURM_NTASKS": "4"}, "SLURM_NTASKS = 4, but RANK and WORLD_SIZE are not set; start with deepspeed"),
        (2, {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, "SLURM_NTASKS = 4, but RANK and WORLD"),
        ("node", {"SLURM_NPROCS": "2"}, "if this is the only process, unset SLURM_NPROCS"),
        (1, {"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE = 2, but RANK and WORLD_SIZE are not set"),
        (2, environment(0, 4, RANK=None), "RANK is not set; start with deepspeed, torchrun or accelerate launch"),
        (2, environment(0, 4, WORLD_SIZE=None), "WORLD_SIZE is not set; start with"),
        (2, environment(0, 4, MASTER_ADDR=None), "MASTER_ADDR is not set; start with"),
        (2, environment(0, 4, MASTER_PORT=None), "MASTER_PORT is not set; start with"),
        (2, environment(0, 4, RANK="zero"), "RANK = 'zero': must be a whole number; the launcher sets it"),
        (2, environment(0, 4, WORLD_SIZE=""), "WORLD_SIZE = '': must be a whole number"),
        (2, environment(0, 4, WORLD_SIZE="4.0"), "WORLD_SIZE = '4.0': must be a whole number"),
        (2, environment(4, 4), "RANK = 4: must lie between 0 and WORLD_SIZE - 1 = 3"),
        (2, environment(-1, 4), "RANK = -1: must lie between 0 and WORLD_SIZE - 1 = 3"),
        (2, environment(0, 0), "RANK = 0: must lie between 0 and WORLD_SIZE - 1 = -1"),
    ],
)
def test_a_bad_environment_is_a_config_error(particles, env, said):
    with pytest.raises(ConfigError) as caught:
        read_layout(particles, env)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@relaxed
@given(st.integers(1, 64), st.integers(1, 64))
def test_a_layout_or_the_divisors(particles, world_size):
    env = environment(world_size - 1, world_size)
    if world_size % particles == 0:
        layout = read_layout(particles, env)
        assert (layout.num_particles, layout.particle) == (particles, particles - 1)
        return
    with pytest.raises(ConfigError) as caught:
        read_layout(particles, env)
    divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
    assert f"use one of {divisors}, or" in str(caught.value)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.integers(-3, 9).map(str)


@relaxed
@given(
    st.integers(1, 5) | st.just("node"),
    st.dictionaries(
        st.sampled_from(["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"]), words
    ),
)
def test_any_environment_gives_a_layout_or_a_config_error(particles, env):
    try:
        layout = read_layout(particles, env)
    except ConfigError:
        return
    assert 0 <= layout.rank < layout.world_size
    assert layout.num_particles * layout.particle_size == layout.world_size


# -- a world without peers ------------------------------------------------------------------


@pytest.fixture
def lonely(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = carve(1)
    yield world
    world.close()  # it has changed the environment


def test_a_world_of_one_rank_needs_no_store_and_talks_to_itself(lonely):
    assert lonely.coordinator.store is None
    assert lonely.peers.group is None
    assert lonely.is_leader
    assert lonely.coordinator.local_ranks_on_this_node == [0]
    assert lonely.coordinator.gather("anything", {"a": [1, None]}) == [{"a": [1, None]}]
    assert lonely.local.gather([1.0, 2.0]) == [[1.0, 2.0]]
    lonely.coordinator.barrier("anywhere", [0])
    lonely.coordinator.gather("anywhere", None)
    lonely.coordinator.next_barrier("anywhere", [0])
    lonely.close()
    lonely.close()


def test_carving_after_torch_is_up_is_refused(monkeypatch):
    for name, value in environment(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="already initialised"):
        carve(2)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConfigError("bad key"), "bad key"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError("strange"), "strange"),
    ],
)
def test_agree_tells_foreseen_errors_in_one_line(lonely, raised, said):
    with pytest.raises(SwarmError, match=said) as caught, lonely.coordinator.agree("reading"):
        raise raised
    assert caught.value.agreed
    assert isinstance(caught.value, ConfigError) == isinstance(raised, ConfigError)


def test_agree_tells_the_others_of_a_bug_too(lonely):
    with (
        pytest.raises(SwarmError, match="reading: ZeroDivisionError: by nothing") as caught,
        lonely.coordinator.agree("reading"),
    ):
        raise ZeroDivisionError("by nothing")
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError), "the traceback must lead to it"
