"""The sampler over all P x S ranks: who sees which sample, and how it goes on after a stop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ds_pso.errors import ConfigError
from ds_pso.sampler import Share, SwarmSampler

relaxed = settings(deadline=None, max_examples=60)


def make_samplers(num_samples: int, world_size: int, batch_size: int, **options) -> list[SwarmSampler]:
    return [
        SwarmSampler(range(num_samples), rank=rank, world_size=world_size, batch_size=batch_size, **options)
        for rank in range(world_size)
    ]


def train(sampler: SwarmSampler, num_batches: int, num_workers: int = 0) -> list[list[int]]:
    """Batches as a training loop sees them; the swarm advances the sampler once a batch is used."""
    loader = DataLoader(
        torch.arange(sampler._dataset_size), sampler._batch_size, sampler=sampler, num_workers=num_workers
    )
    batches = []
    while len(batches) < num_batches:
        for batch in itertools.islice(loader, num_batches - len(batches)):
            batches.append(batch.tolist())
            sampler.advance()
    return batches


worlds = st.tuples(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5)).filter(lambda w: w[0] >= w[1] * w[2])


@relaxed
@given(worlds, st.booleans(), st.integers(0, 99), st.integers(0, 3))
def test_every_sample_at_most_once_an_epoch_and_as_many_for_every_rank(world, shuffle, seed, epoch):
    num_samples, world_size, batch_size = world
    samplers = make_samplers(num_samples, world_size, batch_size, shuffle=shuffle, seed=seed)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    taken = [list(sampler) for sampler in samplers]
    assert {len(indices) for indices in taken} == {len(samplers[0])}
    assert len(samplers[0]) % batch_size == 0
    everything = [index for indices in taken for index in indices]
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(range(num_samples))
    assert num_samples - len(everything) < world_size * batch_size, "a whole batch for everyone is left over"


def test_without_shuffling_the_order_is_the_datasets():
    taken = [list(sampler) for sampler in make_samplers(9, 2, 2, shuffle=False)]
    assert taken == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_epochs_reshuffle_and_leave_others_out():
    sampler, *others = make_samplers(103, 2, 5)
    epochs = []
    for epoch in range(20):
        for one in (sampler, *others):
            one.set_epoch(epoch)
        epochs.append([list(one) for one in (sampler, *others)])
    assert len({tuple(epoch[0]) for epoch in epochs}) == len(epochs)
    left_out = [set(range(103)) - {*epoch[0], *epoch[1]} for epoch in epochs]
    assert len(set.union(*left_out)) > 3


@pytest.mark.parametrize(("other", "same"), [({"seed": 1}, True), ({"seed": 2}, False)])
def test_the_order_depends_on_the_seed_alone(other, same):
    mine, theirs = make_samplers(50, 1, 5, seed=1)[0], make_samplers(50, 1, 5, **other)[0]
    torch.manual_seed(0)
    first = list(mine)
    torch.manual_seed(1)
    assert (first == list(theirs)) == same


def test_it_leaves_torchs_random_state_alone():
    before = torch.get_rng_state()
    list(make_samplers(50, 1, 5)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 5, 7, 10, 13])  # an epoch has 5 batches
def test_resuming_goes_on_exactly(stop, num_workers):
    def fresh() -> SwarmSampler:
        return make_samplers(43, 2, 4, seed=3)[1]

    straight = train(fresh(), 14)
    before = fresh()
    first = train(before, stop, num_workers)
    after = fresh()
    after.load_state_dict(before.state_dict())
    assert first + train(after, 14 - stop, num_workers) == straight


def test_what_workers_fetch_ahead_is_not_counted():
    (sampler,) = make_samplers(40, 1, 4)
    iterator = iter(DataLoader(range(40), 4, sampler=sampler, num_workers=2, prefetch_factor=3))
    next(iterator)
    sampler.advance()
    assert sampler.state_dict()["batch"] == 1


def test_a_loop_left_early_goes_on_where_it_was_left():
    (sampler,) = make_samplers(20, 1, 4, shuffle=False)
    assert train(sampler, 2) + train(sampler, 3) == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert (sampler.epoch, sampler.state_dict()["batch"]) == (1, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loop_ends_when_its_place_is_elsewhere(num_workers):
    """A particle that takes over the state of another sees no more of its own epoch than was fetched ahead."""
    ahead, behind = make_samplers(96, 2, 4)
    whole = train(make_samplers(96, 2, 4)[1], 24)
    train(ahead, 15)
    seen = []
    for indices in DataLoader(torch.arange(96), 4, sampler=behind, num_workers=num_workers, prefetch_factor=None):
        seen.append(indices.tolist())
        behind.advance()
        if len(seen) == 3:
            behind.load_state_dict(ahead.state_dict())
    assert seen == whole[: len(seen)]
    assert 3 <= len(seen) <= 3 + 2 * num_workers
    assert train(behind, 24 - 15 - (len(seen) - 3)) == whole[15 + len(seen) - 3 :]


@pytest.mark.parametrize(("epoch", "place"), [(0, (0, 2)), (1, (1, 0)), (7, (7, 0))])
def test_set_epoch_restarts_only_another_epoch(epoch, place):
    (sampler,) = make_samplers(20, 1, 4)
    train(sampler, 2)
    sampler.set_epoch(epoch)
    assert (sampler.epoch, sampler.state_dict()["batch"]) == place


def test_length_is_of_a_whole_epoch_wherever_it_stands():
    (sampler,) = make_samplers(20, 1, 4)
    assert len(sampler) == 20
    train(sampler, 2)
    assert len(sampler) == 20
    assert len(list(sampler)) == 12


@pytest.mark.parametrize(("num_samples", "world_size", "batch_size"), [(0, 1, 1), (7, 2, 4), (3, 4, 1)])
def test_too_little_data_is_said_with_what_is_needed(num_samples, world_size, batch_size):
    with pytest.raises(ConfigError) as caught:
        make_samplers(num_samples, world_size, batch_size)
    message = str(caught.value)
    assert f"has {num_samples} samples" in message
    assert f"need at least {world_size * batch_size}" in message


@pytest.mark.parametrize(
    ("key", "arguments", "options"),
    [("dataset_size", (21, 1, 4), {}), ("batch_size", (20, 1, 5), {}), ("seed", (20, 1, 4), {"seed": 1})],
)
def test_a_state_of_other_data_is_named(key, arguments, options):
    mine, other = make_samplers(20, 1, 4)[0], make_samplers(*arguments, **options)[0]
    assert mine.check(mine.state_dict()) is None
    reason = mine.check(other.state_dict())
    assert reason == f"the data's {key} was {other.state_dict()[key]} and is {mine.state_dict()[key]} now"


reshaped = worlds.flatmap(
    lambda w: st.tuples(st.just(w), st.integers(1, 6), st.integers(1, 5)).filter(lambda r: r[0][0] >= r[1] * r[2])
)


@relaxed
@given(reshaped, st.integers(0, 99), st.data())
def test_other_numbers_of_ranks_go_on_where_the_data_was_left(case, seed, data):
    """Together they see what no rank has seen yet, and at most one batch of all of them again."""
    (num_samples, world_size, batch_size), new_world, new_batch = case
    before = make_samplers(num_samples, world_size, batch_size, seed=seed)
    done = data.draw(st.integers(0, len(before[0]) // batch_size))
    seen = {index for sampler in before for index in itertools.islice(sampler, done * batch_size)}
    for sampler in before:
        for _ in range(done):
            sampler.advance()
    after = make_samplers(num_samples, new_world, new_batch, seed=seed)
    together = new_world * new_batch
    for sampler in after:
        sampler.load_state_dict(sampler.continued(before[0].state_dict()))
    if after[0].epoch > 0:  # less than a batch of all was left
        assert num_samples - len(seen) < together or done == len(before[0]) // batch_size
        assert {sampler.state_dict()["batch"] for sampler in after} == {0}
        return
    rest = [index for sampler in after for index in sampler]
    assert len(rest) == len(set(rest)), "a sample comes twice in the rest of the epoch"
    assert len(seen & set(rest)) < together
    skipped = set(range(num_samples)) - seen - set(rest)
    assert len(skipped) == num_samples % together, "more is left out than every epoch leaves out"
    assert {len(list(sampler)) for sampler in after} == {len(rest) // new_world}


def test_as_many_ranks_go_on_exactly():
    (sampler,) = make_samplers(48, 1, 4)
    state = sampler.state_dict() | {"epoch": 2, "batch": 5}
    assert sampler.continued(state) == state
    assert sampler.continued(state | {"of_all": 8})["batch"] == 10
    (wide,) = make_samplers(48, 1, 8)
    assert wide.continued(state) == wide.state_dict() | {"epoch": 2, "batch": 2}


def test_groups_of_ranks_that_share_samples_are_counted_as_one():
    """Four ranks, of which each pair computes on the same samples: a checkpoint says that two parts were seen."""
    pair = make_samplers(48, 2, 4)[1]
    state = pair.state_dict() | {"batch": 2}
    assert pair.continued(state) == state
    single = make_samplers(48, 4, 4)[0]
    assert single.is_shared_otherwise(state)
    assert single.continued(state)["batch"] == 1
    assert single.check(state) == "the data's of_all was 8 and is 16 now"


# -- batches of their own -------------------------------------------------------------------------


@relaxed
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(0, 99),
    st.data(),
)
def test_unequal_batches_share_out_each_step_of_all(batches, particle_size, more, seed, data):
    """Step by step the ranks together take the next samples in the order of the epoch."""
    samples = [size * accumulate for size, accumulate in batches for _ in range(particle_size)]
    num_samples = sum(samples) + more
    samplers = [
        SwarmSampler(
            range(num_samples),
            rank=rank,
            world_size=len(samples),
            batch_size=batches[rank // particle_size][0],
            seed=seed,
            share=Share.of([size * accumulate for size, accumulate in batches], particle_size, rank),
        )
        for rank in range(len(samples))
    ]
    taken = [list(sampler) for sampler in samplers]
    steps = num_samples // sum(samples)
    assert [len(indices) for indices in taken] == [steps * number for number in samples]
    by_step = [
        {index for indices, n in zip(taken, samples, strict=True) for index in indices[step * n : (step + 1) * n]}
        for step in range(steps)
    ]
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0]))
    order = torch.randperm(num_samples, generator=generator).tolist()
    assert by_step == [set(order[step * sum(samples) :][: sum(samples)]) for step in range(steps)]

    done = data.draw(st.integers(0, steps - 1))
    for sampler, (_, accumulate) in zip(samplers, [b for b in batches for _ in range(particle_size)], strict=True):
        for _ in range(done * accumulate):
            sampler.advance()
    (alone,) = make_samplers(num_samples, 1, 1, seed=seed)
    for sampler in samplers:
        assert sampler.continued(sampler.state_dict()) == sampler.state_dict()
        assert alone.continued(sampler.state_dict())["batch"] == done * sum(samples)


def test_too_few_samples_for_a_step_of_all():
    with pytest.raises(ConfigError, match="9 samples, and an optimizer step of all particles takes 10"):
        SwarmSampler(range(9), rank=0, world_size=4, batch_size=2, share=Share.of([2, 3], 2, 0))


def test_a_rank_that_asks_for_no_samples_says_nothing_of_batches(recwarn):
    """As between the first and the last stage of a pipeline."""
    (sampler,) = make_samplers(12, 1, 3)
    for _ in range(5):
        sampler.advance()
    sampler.check_batches()
    assert not list(recwarn)
