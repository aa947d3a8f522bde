"""What a script forgets, or does in another way than the documentation: it is right all the same, or it is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from variants import slow_but

import ds_pso
from ds_pso.errors import PeerError, SwarmError
from ds_pso.session.attach import check_engine

from .jobs import Case, Weights, assert_equal, config, place, rank_batches, swarm_of, train, working_weights

SAMPLES = 96
CASE = Case(interval=2, steps=4)


def said(body: Callable[[], Any]) -> list[str]:
    """The warnings of ds_pso."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        body()
    return [str(w.message) for w in caught if "ds_pso" in w.filename or "swarm" in str(w.message)]


# -- data -----------------------------------------------------------------------------------------


def dataset() -> TensorDataset:
    x = torch.randn(SAMPLES, 7, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3] * 2, torch.arange(SAMPLES))


def learn(engine: Any, loader: Any) -> list[list[int]]:
    """One epoch; returns the numbers of the samples in each batch."""
    seen = []
    for x, y, index in loader:
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
        seen.append(index.tolist())
    return seen


def train_on(case: Case, how: str) -> list[str]:
    def body() -> None:
        with swarm_of(case) as (swarm, engine):
            loaders = {
                "torch's": lambda: DataLoader(dataset(), 4, sampler=DistributedSampler(dataset())),
                "no": lambda: DataLoader(dataset(), 4),
                "the swarm's": lambda: DataLoader(dataset(), 4, sampler=swarm.sampler(dataset(), batch_size=4)),
                "one's own": lambda: DataLoader(
                    dataset(), 4, sampler=DistributedSampler(dataset(), 4, swarm.world.layout.rank)
                ),
            }
            learn(engine, loaders[how]())

    return said(body)


@pytest.mark.parametrize(
    ("how", "is_said"),
    slow_but(
        [("torch's", True), ("the swarm's", False)],
        [("torch's", True), ("no", True), ("the swarm's", False), ("one's own", False)],
    ),
)
def test_particles_that_train_on_the_same_samples(pool: Pool, how: str, is_said: bool) -> None:
    leader, *others = pool.run(train_on, CASE, how)
    assert others == [[]] * 3
    if is_said:
        (text,) = leader
        assert "particles 0, 1 were the same so far" in text
        assert "swarm.sampler" in text
    else:
        assert leader == []


def train_past_the_engine(case: Case) -> list[str]:
    """The batches go to the module, where nobody sees them."""

    def body() -> None:
        with swarm_of(case) as (_, engine):
            for step in range(case.steps):
                for x, y in rank_batches(case, 0, *place(case)[1:], step):
                    engine.backward(nn.functional.mse_loss(engine.module(x), y))
                    engine.step()

    return said(body)


def test_particles_that_stay_the_same(pool: Pool) -> None:
    leader, *_ = pool.run(train_past_the_engine, CASE)
    assert "particles 0, 1 were the same so far" in leader[0]


def give_deepspeed_the_data(case: Case, iterated: bool) -> tuple[list[str], list[int], int, dict[str, int]]:
    seen: list[list[int]] = []
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        model = nn.Linear(7, 3)
        engine, _, loader, _ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=swarm.ds_config, training_data=dataset()
        )
        if iterated:
            next(iter(loader))
        swarm.attach(engine)
        found = said(lambda: seen.extend(learn(engine, loader)))
        return found, [i for batch in seen for i in batch], len(loader), swarm.session.samplers[0].state_dict()


@pytest.mark.parametrize("iterated", slow_but([False], [False, True]))
def test_data_that_deepspeed_was_given_is_shared_out(pool: Pool, iterated: bool) -> None:
    ranks = pool.run(give_deepspeed_the_data, CASE, iterated)
    assert [warned for warned, *_ in ranks] == [[]] * 4
    assert sorted(i for _, seen, *_ in ranks for i in seen) == list(range(SAMPLES)), "each sample once in the swarm"
    for _, _, length, state in ranks:
        assert length == SAMPLES // 4 // 4
        assert (state["epoch"], state["batch"]) == (1, 0), "its place is part of a checkpoint"


def use_another_batch_size(case: Case, of_loader: int) -> list[str]:
    def body() -> None:
        with swarm_of(case) as (swarm, engine):
            learn(engine, DataLoader(dataset(), of_loader, sampler=swarm.sampler(dataset(), batch_size=4)))

    return said(body)


@pytest.mark.parametrize(("of_loader", "is_said"), slow_but([(12, True)], [(12, True), (2, True), (4, False)]))
def test_a_loader_with_another_batch_size(pool: Pool, of_loader: int, is_said: bool) -> None:
    leader, *others = pool.run(use_another_batch_size, CASE, of_loader)
    assert others == [[]] * 3
    assert [f"batches of about {of_loader}" in text for text in leader] == [True] * is_said


# -- calls ----------------------------------------------------------------------------------------


def forget(case: Case, what: str) -> list[str]:
    def body() -> None:
        with swarm_of(case, attach=what != "attach") as (swarm, engine):
            if what == "engine.backward":
                engine.backward = lambda loss: loss.backward()
            train(case, engine)
            if what == "nothing":
                swarm.merge()

    return said(body)


@pytest.mark.parametrize(("stage", "clip", "warns"), [(2, 1.0, True), (0, 1.0, False), (2, 0.0, False)])
def test_muon_whose_update_would_be_clipped(pool: Pool, stage: int, clip: float, warns: bool) -> None:
    """At stage 0 gradients are clipped, and not what Muon has made of them."""
    case = Case(stage=stage, interval=1, steps=1, optimizer="Muon", deepspeed={"gradient_clipping": clip})
    leader, *others = pool.run(attached, case, world_size=2)
    assert others == [[]]
    assert [text for text in leader if "gradient_clipping" in text] == leader
    assert len(leader) == warns


def attached(case: Case) -> list[str]:
    def body() -> None:
        with swarm_of(case):
            pass

    return [text for text in said(body) if "synced" not in text]


@pytest.mark.parametrize(
    ("what", "interval", "text"),
    [
        ("attach", 2, "no engine was attached"),
        ("that training is short", 100, "the particles never synced: training had 4 steps"),
        ("engine.backward", 2, "the swarm has seen no loss before its first sync"),
        ("nothing", 100, None),
        pytest.param("nothing", 2, None, marks=pytest.mark.slow),
    ],
)
def test_a_call_that_was_forgotten(pool: Pool, what: str, interval: int, text: str | None) -> None:
    leader, *others = pool.run(forget, Case(interval=interval, steps=4), what)
    assert others == [[]] * 3
    assert len(leader) == (text is not None)
    if text:
        assert text in leader[0]


@pytest.mark.parametrize(
    ("given", "text"),
    [(nn.Linear(2, 2), "a Linear, which is no"), ((1, 2, 3, 4), "the first is the engine"), (None, "a NoneType")],
    ids=["module", "tuple", "None"],
)
def test_attaching_what_is_no_engine(given: object, text: str) -> None:
    with pytest.raises(SwarmError, match=text):
        check_engine(given)


def take_unequally_many_steps(case: Case) -> tuple[str, int]:
    with swarm_of(case) as (swarm, engine):
        try:
            train(case, engine, range(5 if swarm.particle == 0 else case.steps))
        except PeerError as error:
            return str(error), engine.global_steps
        return "", engine.global_steps


def test_a_particle_that_has_closed_is_not_waited_for(pool: Pool) -> None:
    case = Case(interval=2, steps=8, swarm={"timeout_s": 600})  # the pool waits 60
    for rank, (text, steps) in enumerate(pool.run(take_unequally_many_steps, case)):
        assert steps == (5 if rank < 2 else 6)
        if rank >= 2:
            assert f"these have closed their swarm: particle 0, rank {rank - 2}" in text
            assert "after 5 optimizer steps" in text


def end_both(case: Case, first: str) -> bool:
    swarm = ds_pso.init(config(case, place(case)[2]))
    with warnings.catch_warnings(action="ignore"):
        model = nn.Linear(7, 3)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
        swarm.attach(engine)
        if first == "swarm":
            swarm.close()
            dist.all_reduce(torch.ones(1))  # such as the mean of a last evaluation
            dist.destroy_process_group()
        else:
            dist.destroy_process_group()
            swarm.close()
    return dist.is_initialized()


@pytest.mark.parametrize("first", slow_but(["swarm"], ["swarm", "torch"]))
def test_swarm_and_torchs_world_end_in_either_order(pool: Pool, first: str) -> None:
    assert pool.run(end_both, CASE, first) == [False] * 4


# -- DeepSpeed's own checkpoints ------------------------------------------------------------------


def save_with_the_engine(case: Case, folder: Path, stop: int | None, tag: str | None) -> Weights:
    with swarm_of(case) as (swarm, engine):
        begin = 0
        if stop is None and folder.exists():
            path, _ = engine.load_checkpoint(str(folder), tag)
            assert path is not None
            begin = engine.global_steps
        train(case, engine, range(begin, stop or case.steps))
        if stop is not None:
            engine.save_checkpoint(str(folder), tag)
        swarm.finish_pending()
        return working_weights(engine)


@pytest.mark.parametrize(("stage", "tag"), slow_but([(2, None)], [(0, None), (2, None), (3, "mine")]))
def test_the_engines_own_checkpoints_resume_bit_for_bit(pool: Pool, tmp_path: Path, stage: int, tag: str) -> None:
    case = Case(stage=stage, sync_mode="diloco", interval=3, steps=8, swarm={"wire": "int8"})
    expected = pool.run(save_with_the_engine, case, tmp_path / "none", None, None)
    pool.run(save_with_the_engine, case, tmp_path / "folder", 5, tag)
    found = pool.run(save_with_the_engine, case, tmp_path / "folder", None, tag)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"particle_0", "particle_1"}


def load_weights_alone(case: Case, folder: Path) -> Weights:
    with swarm_of(case) as (_, engine):
        train(case, engine, range(5))
        engine.save_checkpoint(str(folder))
        engine.load_checkpoint(str(folder), load_module_only=True)
        return working_weights(engine)


@pytest.mark.parametrize("delay", [0, 3])  # 3: the sync after step 3 is pending at step 5
def test_weights_alone_are_a_new_beginning_from_those_of_particle_0(pool: Pool, tmp_path: Path, delay: int) -> None:
    case = Case(sync_mode="diloco", interval=3, swarm={"delay": delay})
    first, *others = pool.run(load_weights_alone, case, tmp_path)
    for weights in others:
        assert_equal(weights, first)
