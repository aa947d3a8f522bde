"""A checkpoint goes on with other numbers of particles and ranks: every element of every parameter, bit for bit."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool

import ds_pso
from ds_pso.shards import find_shards
from ds_pso.shards.fragments import trained_numels

from .jobs import (
    Case,
    assert_close,
    assert_equal,
    build_engine,
    config,
    one_after_the_other,
    place,
    swarm_of,
    train,
    working_weights,
)
from .spoiled import seal
from .test_consolidate import Tied, edit, flip, frozen, poison, truncate
from .test_publish import BF16_MASTERS

Shape = tuple[int, int]  # P, S
PSO = {"inertia": 0.3, "cognitive": 0.5}
# What is kept and divided in a way of its own; a sync point after two of three steps.
CASES = [
    Case(stage=2, sync_mode="pso", options=PSO, groups=2),
    Case(stage=3, sync_mode="diloco", swarm={"wire": "int8"}, deepspeed={"zero_optimization": {"sub_group_size": 20}}),
    Case(stage=1, precision="bf16", sync_mode="easgd", optimizer="SGD", momentum=0.9),
    Case(stage=0, sync_mode="pso", options=PSO, swarm={"wire": "int4"}),
    Case(stage=2, optimizer="Muon", momentum=0.9, layers=2, swarm={"wire": "sparse", "residual": "weights"}),
]
MORE = [
    Case(stage=1, precision="bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}, groups=2),
    Case(stage=2, precision="fp16", sync_mode="diloco", swarm={"state_dtype": "bf16"}),
    Case(stage=2, sync_mode="diloco", deepspeed={"zero_optimization": {"round_robin_gradients": True}}),
    Case(stage=3, precision="bf16", sync_mode="pso", options=PSO, groups=2),
    Case(stage=3, optimizer="SGD", momentum=0.9),
    *(Case(stage=s, precision="bf16", deepspeed=BF16_MASTERS) for s in (2, 3)),
    *(Case(stage=s, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) for s in (2, 3)),
    Case(stage=1, deepspeed={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}),
    Case(stage=0, precision="bf16", sync_mode="diloco", groups=2),
    Case(stage=0, precision="fp16", fused=True),
    *(Case(stage=s, optimizer="Muon", momentum=0.9, layers=2) for s in (0, 3)),
    Case(stage=1, optimizer="Muon", momentum=0.9, precision="bf16", groups=2),
    # At step 3 a sync point is pending, and half of it has been applied.
    *(
        Case(stage=s, sync_mode="easgd", optimizer="SGD", momentum=0.5, swarm={"delay": 2, "fragments": 2})
        for s in (0, 3)
    ),
    Case(stage=2, sync_mode="diloco", swarm={"wire": "int8", "delay": 2}),
    Case(stage=2, interval=4, sync_mode="pso", options=PSO, swarm={"delay": 2, "fragments": 2, "streaming": True}),
]


def pieces(swarm: Any) -> list[tuple[str, int, np.ndarray]]:
    """All that this rank keeps of the parameters: (what and of which parameter, offset in it, values)."""
    synchronizer, shards = swarm.session.synchronizer, find_shards(swarm.engine)
    kinds = {"x": shards.tensors}
    of_matrices = swarm.engine.basic_optimizer.__class__.__name__.startswith("Muon")
    if not of_matrices:
        moments, count = shards.moments(), len(shards.tensors)
        each = len(moments) // count
        kinds |= {f"moment {j}": [moments[i * each + j] for i in range(count)] for j in range(each)}
    if synchronizer is not None:
        kinds |= {
            f"rule {name}": [s[name] for s in synchronizer.parts.updater.state]
            for name in synchronizer.parts.updater.state[0]
        }
        differences = synchronizer.parts.updater.differences
        if differences is not None:
            kinds |= {"common": differences.common}
            kinds |= {"residual": differences.residual} if differences.residual else {}
    found = [
        (f"{kind} of {s.name}", s.param_start, tensors[s.shard][s.shard_start :][: s.numel].float().numpy().copy())
        for kind, tensors in kinds.items()
        for s in shards.segments
    ]
    return found + (list(muon_pieces(shards)) if of_matrices else [])


def muon_pieces(shards: Any) -> Iterator[tuple[str, int, np.ndarray]]:
    """The moments of Muon and of its Adam. A rank may keep the momentum of whole matrices of which it has a part."""
    moments = iter(shards.moments())
    numels = trained_numels(shards)
    matrices = {name for name, p in shards.module.named_parameters() if getattr(p, "use_muon", False)}
    for number, shard in enumerate(shards.tensors):
        mine = [s for s in shards.segments if s.shard == number]
        for kind in ["momentum"] if mine[0].name in matrices else ["exp_avg", "exp_avg_sq"]:
            values, start = next(moments).float().numpy().copy(), 0
            if kind == "momentum" and len(values) == sum(numels[name] for name in {s.name for s in mine}):
                for s in mine:  # what it keeps of other ranks' parts shows in the steps that follow
                    yield f"{kind} of {s.name}", s.param_start, values[start + s.param_start :][: s.numel]
                    start += numels[s.name]
            else:
                assert len(values) == len(shard)
                for s in mine:
                    yield f"{kind} of {s.name}", s.param_start, values[s.shard_start :][: s.numel]
    assert next(moments, None) is None


def numbers(swarm: Any) -> dict[str, Any]:
    """What the ranks of a particle hold alike."""
    engine = swarm.engine
    found = {
        "steps": [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.get_lr()],
        "counts": [float(s["step"]) for s in engine.basic_optimizer.state.values() if "step" in s][:1],
        "scale": getattr(engine.optimizer, "cur_scale", None),
        "window": swarm.world.local.gather([swarm.session.window.total, float(swarm.session.window.count)]),
        "window_steps": swarm.session.window.steps,
    }
    if swarm.session.synchronizer is not None:
        found |= {
            "memories": [dict(memory) for memory in swarm.session.synchronizer.parts.memories],
            "losses": swarm.last_losses,
            "syncs": swarm.totals.count,
            "schedule": swarm.session.synchronizer.parts.schedule.state_dict(),
        }
    return found


@dataclass(frozen=True)
class Rank:
    pieces: list[tuple[str, int, np.ndarray]]
    numbers: dict[str, Any]
    weights: dict[str, np.ndarray]
    later: list[tuple[str, int, np.ndarray]]  # pieces, some steps on
    counts: set[float]  # by then, of the optimizer's steps


def report(case: Case, swarm: Any) -> Rank:
    step = swarm.engine.global_steps
    now = pieces(swarm), numbers(swarm), working_weights(swarm.engine)
    more = 6 if "streaming" in case.swarm else 3  # each fragment has its turn
    train(case, swarm.engine, range(step, step + more))
    swarm.finish_pending()
    counts = {float(state["step"]) for state in swarm.engine.basic_optimizer.state.values() if "step" in state}
    return Rank(*now, pieces(swarm), counts)


def save_all(cases: list[Case], folder: Path, steps: int) -> list[Rank]:
    """Each in a folder of its number."""
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        train(case, engine, range(steps))
        swarm.world.background.settle()
        swarm.save(folder / str(cases.index(case)))
        found.append(report(case, swarm))
    return found


def load_all(cases: list[Case], folder: Path) -> list[Rank]:
    found = []
    for case, swarm, engine in one_after_the_other(cases):
        assert swarm.load(folder / str(cases.index(case)), reshape=True) == engine.global_steps
        found.append(report(case, swarm))
    return found


def at(cases: list[Case], shape: Shape, seed: int | None = None) -> list[Case]:
    return [replace(case, particles=shape[0], seed=seed) for case in cases]


def saved(pool: Pool, cases: list[Case], shape: Shape, folder: Path, steps: int = 3) -> list[list[Rank]]:
    return pool.run(save_all, at(cases, shape), folder, steps, world_size=shape[0] * shape[1], timeout=200)


def particle(ranks: list[Rank], number: int, size: int) -> list[Rank]:
    return ranks[number * size : (number + 1) * size]


def assembled(ranks: list[list[tuple[str, int, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Whole parameters of the pieces of each rank; every element must be there once."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, start, values in (piece for rank in ranks for piece in rank):
        found.setdefault(name, []).append((start, values))
    whole = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        ends = np.cumsum([len(values) for _, values in parts])
        assert [start for start, _ in parts] == [0, *ends[:-1]], name
        whole[name] = np.concatenate([values for _, values in parts])
    return whole


def assert_continued(before: list[Rank], old: Shape, after: list[Rank], new: Shape) -> None:
    """Particle j is what particle j mod P was."""
    for j in range(new[0]):
        was, now = particle(before, j % old[0], old[1]), particle(after, j, new[1])
        expected, found = assembled([r.pieces for r in was]), assembled([r.pieces for r in now])
        if 1 in (new[0], old[0]):
            expected, found = of_the_engine(expected), of_the_engine(found)
        assert any(name.startswith("moment") for name in found)
        assert_equal(found, expected)
        for rank in now:
            assert_equal(rank.weights, was[0].weights)
            assert_numbers(rank.numbers, was[0].numbers, old, new)
            assert rank.counts == was[0].counts


def of_the_engine(whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in whole.items() if name.startswith(("x", "moment"))}


def assert_numbers(now: dict[str, Any], was: dict[str, Any], old: Shape, new: Shape) -> None:
    for key in ("steps", "counts", "scale"):
        assert now[key] == was[key], key
    if new[0] == 1 or old[0] == 1:
        return
    for key in ("syncs", "schedule", "window_steps"):
        assert now[key] == was[key], key
    np.testing.assert_allclose(np.sum(now["window"], 0), np.sum(was["window"], 0), rtol=1e-12)
    repeated = [j % old[0] for j in range(new[0])]
    np.testing.assert_array_equal(now["losses"], [was["losses"][j] for j in repeated])
    for mine, theirs in zip(now["memories"], was["memories"], strict=True):
        assert mine == {key: [value[j] for j in repeated] for key, value in theirs.items()}  # of pso: all are lists


@pytest.fixture(scope="module")
def two_by_two(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Rank]]]:
    folder = tmp_path_factory.mktemp("two_by_two")
    return folder, saved(pool, CASES, (2, 2), folder)


def check(pool: Pool, cases: list[Case], folder: Path, before: list[list[Rank]], old: Shape, new: Shape) -> None:
    # Another seed: everything must come from the checkpoint.
    after = pool.run(load_all, at(cases, new, 12345), folder, world_size=new[0] * new[1], timeout=200)
    for number, case in enumerate(cases):
        was, now = [rank[number] for rank in before], [rank[number] for rank in after]
        assert_continued(was, old, now, new)
        for j in range(new[0]):
            later = of_the_engine(assembled([rank.later for rank in particle(now, j, new[1])]))
            assert all(np.isfinite(value).all() for value in later.values()), "training does not go on"
            # The same data in other parts, and sums in another order; 8 rows are no multiple of 3.
            if old[0] == new[0] and 3 not in (old[1], new[1]) and case.precision == "fp32" and "wire" not in case.swarm:
                expected = assembled([rank.later for rank in particle(was, j, old[1])])
                assert_close(later, of_the_engine(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "new",
    [
        (2, 3),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(1, 2), (4, 1), (2, 1), (3, 2), (1, 1), (1, 4), (3, 1)]
        ),
    ],
    ids=str,
)
def test_every_element_goes_where_it_belongs(pool: Pool, two_by_two: Any, new: Shape) -> None:
    check(pool, CASES, *two_by_two, (2, 2), new)


@pytest.fixture(scope="module")
def more(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Rank]]]:
    folder = tmp_path_factory.mktemp("more")
    return folder, saved(pool, MORE, (2, 2), folder)


@pytest.mark.slow
@pytest.mark.parametrize("new", [(4, 1), (2, 1), (2, 3), (1, 2), (1, 1)], ids=str)
def test_whatever_is_kept_goes_where_it_belongs(pool: Pool, more: Any, new: Shape) -> None:
    check(pool, MORE, *more, (2, 2), new)


@pytest.mark.slow
def test_fragments_go_on_with_other_numbers_of_ranks(pool: Pool, tmp_path: Path) -> None:
    """At step 4 one of three has been applied, and the next is due; of streaming ones the second is on its way."""
    base = Case(layers=4, sync_mode="easgd", optimizer="SGD", momentum=0.5)
    late = {"interval": 3, "swarm": {"delay": 3, "fragments": 3}}
    streaming = {"interval": 4, "swarm": {"delay": 2, "fragments": 2, "streaming": True}}
    cases = [replace(base, stage=stage, **more) for stage in (2, 3) for more in (late, streaming)]
    check(pool, cases, tmp_path, saved(pool, cases, (2, 2), tmp_path, steps=4), (2, 2), (2, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"), [((2, 1), (2, 2)), ((4, 1), (2, 2)), ((2, 3), (2, 2)), ((1, 2), (1, 3)), ((1, 2), (1, 1))], ids=str
)
def test_from_other_shapes(pool: Pool, tmp_path: Path, old: Shape, new: Shape) -> None:
    check(pool, CASES, tmp_path, saved(pool, CASES, old, tmp_path), old, new)


# -- there and back -------------------------------------------------------------------------------


def save_anew(cases: list[Case], folder: Path, to: Path) -> None:
    for case, swarm, _ in one_after_the_other(cases):
        number = str(cases.index(case))
        swarm.load(folder / number, reshape=True)
        swarm.save(to / number)


@pytest.mark.parametrize(
    ("by_way_of", "dropout"),
    [
        ((4, 1), 0.3),
        pytest.param((2, 1), 0.0, marks=pytest.mark.slow),
        pytest.param((6, 1), 0.3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_there_and_back_nothing_has_happened(pool: Pool, tmp_path: Path, by_way_of: Shape, dropout: float) -> None:
    """With dropout the random states count, too: there are none to keep where ranks are missing."""
    cases = [
        Case(stage=2, sync_mode="pso", options=PSO, dropout=dropout),
        Case(stage=3, sync_mode="diloco", swarm={"wire": "int8", "delay": 2}, dropout=dropout),
    ]
    saved(pool, cases, (2, 2), tmp_path / "first")
    world_size = by_way_of[0] * by_way_of[1]
    pool.run(save_anew, at(cases, by_way_of), tmp_path / "first", tmp_path / "second", world_size=world_size)
    straight = pool.run(load_all, at(cases, (2, 2)), tmp_path / "first", timeout=120)
    back = pool.run(load_all, at(cases, (2, 2)), tmp_path / "second", timeout=120)
    for was, now in zip(straight, back, strict=True):
        for expected, found in zip(was, now, strict=True):
            for mine, theirs in ((found.pieces, expected.pieces), (found.later, expected.later)):
                assert_equal(*({f"{name}[{start}:]": v for name, start, v in part} for part in (mine, theirs)))
            assert_equal(found.weights, expected.weights)
            np.testing.assert_equal({**found.numbers, "window": 0}, {**expected.numbers, "window": 0})


# -- what is not of a parameter -------------------------------------------------------------------

BUFFERS = Case(batch_norm=True, swarm={"timeout_s": 20})
DATA = range(100)


def of_each_rank(case: Case, folder: Path, save: bool) -> dict[str, Any]:
    with swarm_of(case) as (swarm, engine), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = swarm.sampler(DATA)
        torch.manual_seed(1000 + swarm.world.layout.rank)
        random.seed(1000 + swarm.world.layout.rank)
        if save:
            train(case, engine, range(3))
            swarm.save(folder)
        else:
            swarm.load(folder, reshape=True)
        return {
            "buffers": {name: buffer.float().numpy().copy() for name, buffer in engine.module.named_buffers()},
            "random": [torch.rand(1).item(), random.random()],
            "data": sampler.state_dict(),
            "warned": [str(w.message) for w in caught if "left behind" in str(w.message)],
        }


@pytest.mark.parametrize("new", [(3, 2), pytest.param((1, 3), marks=pytest.mark.slow)], ids=str)
def test_what_each_rank_has_of_its_own(pool: Pool, tmp_path: Path, new: Shape) -> None:
    before = pool.run(of_each_rank, BUFFERS, tmp_path, True)
    particles, size = new
    after = pool.run(of_each_rank, replace(BUFFERS, particles=particles), tmp_path, False, world_size=particles * size)
    drawn = {tuple(rank["random"]) for rank in before}
    for number, rank in enumerate(after):
        predecessor = before[2 * (number // size % 2) + number % size % 2]
        assert_equal(rank["buffers"], predecessor["buffers"])
        if number < len(before):
            assert rank["random"] == before[number]["random"]
        else:
            generator = torch.Generator().manual_seed(1000 + number)
            assert rank["random"] == [torch.rand(1, generator=generator).item(), random.Random(1000 + number).random()]
            assert tuple(rank["random"]) not in drawn
    # 3 batches of 4 rows on 4 ranks are 48 samples; now a batch of all is 6 ranks with 4 rows, or 3 with 2.
    assert {rank["data"]["batch"] for rank in after} == {48 // (len(after) * (8 // size))}
    left = [f"saved with 2 particles; what those from number {particles} on have"] if particles < 2 else []
    assert [text in rank["warned"][0] for rank in after[:1] for text in left] == [True] * len(left)
    assert not any(rank["warned"] for rank in after[len(left) :])


MODELS = {"frozen": frozen, "tied": Tied}


def other_models(stages: list[int], particles: int, folder: Path, save: bool) -> list[dict[str, np.ndarray]]:
    world, found = None, []
    for name, build in MODELS.items():
        for stage in stages:
            case, here = Case(stage=stage, particles=particles), folder / f"{name}{stage}"
            swarm = ds_pso.init(config(case, place(case)[2]), world=world)
            world = swarm.world
            torch.manual_seed(0 if save else 1)
            engine = swarm.attach(build_engine(case, swarm.ds_config, build()))
            if save:
                train(case, engine, range(1))
                swarm.save(here)
            else:
                swarm.load(here, reshape=True)
            found.append(working_weights(engine))
            train(case, engine, range(1, 2))
    if world is not None:
        world.close()
    return found


@pytest.mark.slow
def test_parameters_that_are_frozen_or_tied(pool: Pool, tmp_path: Path) -> None:
    before = pool.run(other_models, [0, 2, 3], 2, tmp_path, True, timeout=120)
    for new in ((2, 1), (1, 3)):
        after = pool.run(other_models, [0, 2, 3], new[0], tmp_path, False, world_size=new[0] * new[1], timeout=120)
        for number, rank in enumerate(after):
            for found, expected in zip(rank, before[2 * (number // new[1])], strict=True):
                assert_equal(found, expected)


def test_a_lone_particle_becomes_several(pool: Pool, tmp_path: Path) -> None:
    """They are equal, and what the rule and the wire keep follows from their weights."""
    cases = [
        Case(stage=2, sync_mode="pso", options=PSO),
        Case(stage=3, sync_mode="diloco", options={"outer_lr": 1, "outer_momentum": 0}, swarm={"wire": "int8"}),
        Case(stage=0, sync_mode="swarm", options={"guard": False, "inertia": 0.5}),
    ]
    before = saved(pool, cases, (1, 2), tmp_path)
    after = pool.run(load_all, at(cases, (2, 1), 12345), tmp_path, world_size=2, timeout=120)
    equal_to_x = ["rule best_position", "rule anchor", "common"]
    zero = ["rule velocity", "rule momentum", "residual"]
    for number in range(len(cases)):
        was = of_the_engine(assembled([rank[number].pieces for rank in before]))
        for rank in after:
            now = assembled([rank[number].pieces])
            assert_equal(of_the_engine(now), was)
            kept = {name: value for name, value in now.items() if name not in was}
            assert kept
            for name, value in kept.items():
                kind, parameter = name.split(" of ")
                assert kind in equal_to_x + zero
                expected = was[f"x of {parameter}"] if kind in equal_to_x else np.zeros_like(value)
                np.testing.assert_array_equal(value, expected, err_msg=name)
            assert rank[number].numbers["syncs"] == 0
            assert rank[number].numbers["memories"] == [{}]
            assert np.sum(rank[number].numbers["window"]) == 0


# -- refusals -------------------------------------------------------------------------------------

GOOD = Case(sync_mode="pso", options=PSO, swarm={"timeout_s": 20})
OTHERS = {
    "zero_stage 2, and this run has 1": replace(GOOD, stage=1),
    "saved with sync_mode pso": replace(GOOD, sync_mode="diloco", options={}),
    "saved with wire fp32": replace(GOOD, swarm={"wire": "int8"}),
    "as configured now": replace(GOOD, options={"cognitive": 0.5}),
    "holds the state": replace(GOOD, batch_norm=True),
    "was saved as torch.float32": replace(GOOD, precision="bf16"),
    "has 1 parameter groups, and 2 now": replace(GOOD, groups=2),
    "keeps the optimizer's state in a form of its own": replace(
        GOOD, deepspeed={"zero_optimization": {"elastic_checkpoint": True}}
    ),
}


def save_good(folder: Path) -> None:
    with swarm_of(GOOD) as (swarm, engine):
        train(GOOD, engine, range(3))
        swarm.save(folder)


@pytest.fixture(scope="module")
def good(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    pool.run(save_good, folder)
    return folder


def try_to_load(
    cases: list[Case], folders: list[Path], reshape: bool = True, tag: str | None = None
) -> list[tuple[str, bool]]:
    """Of each case and folder: what it says, and whether the engine is as before."""
    found = []
    for _, swarm, engine in one_after_the_other(cases):
        before = repr([working_weights(engine), pieces(swarm)])
        for folder in folders:
            text = "loaded"
            try:
                swarm.load(folder, tag, reshape=reshape)
            except ds_pso.CheckpointError as error:
                text = str(error)
            found.append((text, repr([working_weights(engine), pieces(swarm)]) == before))
    return found


def assert_refused(ranks: list[list[tuple[str, bool]]], expected: list[str]) -> None:
    for rank in ranks:
        assert rank == ranks[0], "the ranks do not agree"
    for (text, unchanged), part in zip(ranks[0], expected, strict=True):
        assert part in text
        assert unchanged, text


def test_what_does_not_fit_is_refused(pool: Pool, good: Path) -> None:
    cases = at(list(OTHERS.values()), (4, 1))
    assert_refused(pool.run(try_to_load, cases, [good], timeout=120), list(OTHERS))


def test_the_refusal_names_the_remedy(pool: Pool, good: Path) -> None:
    remedy = "or load it with reshape=True (train.py: --reshape)"
    for new in ((4, 1), (2, 1), (3, 2)):
        ranks = pool.run(try_to_load, at([GOOD], new), [good], False, world_size=new[0] * new[1])
        assert_refused(ranks, [remedy])


def another_shape_of_moments(source: Path) -> None:
    for path in source.glob("particle_*/deepspeed/*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["exp_avg"] = state["exp_avg"].view(1, -1)
        torch.save(content, path)
        seal(source, path)


DAMAGE = {
    "checksum differs": flip,
    "which is no plain data; no code of it was run": poison,
    "where the parameters of its engine lie, so it cannot be brought": edit("shards", None),
    "cut short": truncate,
    "bring the files of all ranks together": lambda source: (source / "swarm/rank_00003.json").unlink(),
    "holds no record of any rank": lambda source: [path.unlink() for path in source.glob("swarm/rank_*.json")],
    "which cannot be divided anew": another_shape_of_moments,
}


def test_damage_is_found_before_anything_is_loaded(pool: Pool, good: Path, tmp_path: Path) -> None:
    folders = []
    for number, damage in enumerate(DAMAGE.values()):
        shutil.copytree(good, tmp_path / str(number))
        damage(tmp_path / str(number) / "step_00000003")
        folders.append(tmp_path / str(number))
    cases, named = at([GOOD], (2, 1)), "step_00000003"  # without a name the one before would be looked for
    assert_refused(pool.run(try_to_load, cases, folders, True, named, world_size=2, timeout=120), list(DAMAGE))
    assert not list(tmp_path.rglob("evil")), "code of the checkpoint was run"
