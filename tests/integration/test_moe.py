"""DeepSpeed's MoE layers inside a particle: with expert parallelism each of its ranks holds other experts.

The reference is plain torch, in one process, with all experts; and the same swarm whose ranks hold all experts each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from variants import slow_but

import ds_pso
from ds_pso.export.offline import consolidate, find_checkpoint
from ds_pso.shards import find_shards
from ds_pso.swarm import Swarm

from .jobs import (
    Case,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    config,
    master_pieces,
    particle_batch,
    place,
    swarm_of,
    train,
)

EXPERTS = 4


class Net(nn.Module):
    """As that of the other tests, with four experts in the middle. All of what a rank holds depends on the seed."""

    def __init__(self, ep_size: int, rank: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(7, 5), nn.Linear(5, 3)
        expert = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
        self.moe = MoE(5, expert, EXPERTS, ep_size, drop_tokens=False, use_rts=False, min_capacity=0)
        experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        for local, expert in enumerate(experts):
            torch.manual_seed(10 * seed + rank % ep_size * len(experts) + local)
            for layer in (expert[0], expert[2]):
                layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.moe(x)[0])


class Pyramid(nn.Module):
    """A residual layer of two experts that every rank has, and below it one that is spread; tokens are dropped."""

    def __init__(self, ep_size: int, rank: int, seed: int) -> None:
        super().__init__()
        self.net = Net(ep_size, rank, seed)
        self.net.moe.deepspeed_moe.gate.drop_tokens = True
        torch.manual_seed(seed)
        expert = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
        self.top = MoE(3, expert, 2, 1, k=2, use_residual=True, min_capacity=0, top2_2nd_expert_sampling=False)

    def forward(self, x: Tensor) -> Tensor:
        x, loss, _ = self.top(self.net(x))
        return x + 0.1 * (loss + self.net.moe.deepspeed_moe.l_aux)


@dataclass(frozen=True)
class Job:
    case: Case
    ep_size: int = 2
    kind: str = ""  # "frozen": the second layer of every expert is not trained; "pyramid": another model

    def __str__(self) -> str:
        return f"{self.case}-ep{self.ep_size}{self.kind and '-' + self.kind}"


def build(job: Job, ds_config: dict[str, Any], model: nn.Module | None = None) -> Any:
    particle, rank, _ = place(job.case)
    kind = Pyramid if job.kind == "pyramid" else Net
    model = kind(job.ep_size, rank, 100 + particle) if model is None else model
    if job.kind == "frozen":
        for expert in model.moe.deepspeed_moe.experts.deepspeed_experts:
            expert[2].requires_grad_(False)
    if job.case.fused:
        deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    engine, *_ = deepspeed.initialize(model=model, model_parameters=[*model.parameters()], config=ds_config)
    return engine


def swarms(jobs: list[Job]) -> Iterator[tuple[Job, Swarm, Any]]:
    """Swarms of one launch, each begun in the world of the one before."""
    world = None
    for job in jobs:
        swarm = ds_pso.init(config(job.case, place(job.case)[2]), world=world)
        world = swarm.world
        yield job, swarm, swarm.attach(build(job, swarm.ds_config))
    if world is not None:
        world.close()


def working(swarm: Swarm) -> Weights:
    """What the forward pass of this rank uses, by the names of the whole model."""
    found = find_shards(swarm.engine).whole
    return {p.name: p.like.detach().float().numpy().copy() for p in found if p.is_here}


def pieces(swarm: Swarm) -> list[tuple[str, int, np.ndarray]]:
    """This rank's part of the masters, and of the moments under names with a number."""
    shards = find_shards(swarm.engine)
    moments, count = shards.moments(), len(shards.tensors)
    kinds = {"": shards.tensors}
    kinds |= {f"{j} of ": moments[j :: len(moments) // count] for j in range(len(moments) // count)}
    return [
        (kind + s.name, s.param_start, tensors[s.shard][s.shard_start : s.shard_start + s.numel].numpy().copy())
        for kind, tensors in kinds.items()
        for s in shards.segments
    ]


def whole(ranks: list[Weights]) -> Weights:
    """The model of a particle from what its ranks hold; what several hold must be the same bits."""
    found: Weights = {}
    for rank in ranks:
        assert_equal({name: rank[name] for name in rank if name in found}, {n: found[n] for n in rank if n in found})
        found |= rank
    return found


# -- the reference: plain torch -------------------------------------------------------------------------


def expert_name(number: int, layer: int, kind: str) -> str:
    return f"moe.deepspeed_moe.experts.deepspeed_experts.{number}.{layer}.{kind}"


def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The best expert of each token, times its share of the softmax."""
    x = F.linear(x, w["first.weight"], w["first.bias"])
    shares = F.softmax(x @ w["moe.deepspeed_moe.gate.wg.weight"].T, dim=1)
    rows = []
    for token, share, best in zip(x, shares, shares.argmax(1).tolist(), strict=True):
        first, second = ([w[expert_name(best, layer, kind)] for kind in ("weight", "bias")] for layer in (0, 2))
        rows.append(token + share[best] * F.linear(torch.tanh(F.linear(token, *first)), *second))
    return F.linear(torch.stack(rows), w["last.weight"], w["last.bias"])


def trained_by_torch(case: Case, start: Weights) -> list[Weights]:
    """Both particles, which become their mean every few steps; or one, which goes half of the way that it has gone."""
    count = int(case.particles)
    particles = [{name: nn.Parameter(torch.tensor(value)) for name, value in start.items()} for _ in range(count)]
    anchor = {name: torch.tensor(value) for name, value in start.items()}
    optimizers = [getattr(torch.optim, case.optimizer)(w.values(), lr=case.lr) for w in particles]
    for step in range(case.steps):
        for number, (w, optimizer) in enumerate(zip(particles, optimizers, strict=True)):
            x, y = particle_batch(number, step)
            optimizer.zero_grad()
            F.mse_loss(forward(w, x), y).backward()
            for parameter in w.values():  # DeepSpeed steps also with an expert that no token has chosen
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizer.step()
        if (step + 1) % case.interval == 0:
            with torch.no_grad():
                for name in start:
                    mean = sum(w[name] for w in particles) / count
                    anchor[name] = (anchor[name] + mean) / 2 if count == 1 else mean
                    for w in particles:
                        w[name].copy_(anchor[name])
    return [{name: value.detach().numpy() for name, value in w.items()} for w in particles]


def start_and_end(jobs: list[Job]) -> list[tuple[Weights, Weights, Any]]:
    found = []
    for job, swarm, engine in swarms(jobs):
        start = working(swarm)
        train(job.case, engine)
        swarm.finish_pending()
        found.append((start, working(swarm), master_pieces(swarm)))
    return found


SGD = Case(optimizer="SGD", lr=0.3, steps=5)
JOBS = [
    *(Job(replace(SGD, stage=stage), ep_size) for stage in (0, 1, 2) for ep_size in (1, 2)),
    *(Job(Case(stage=stage, steps=5)) for stage in (0, 2)),
]


@pytest.fixture(scope="module")
def ends(pool: Pool) -> list[list[tuple[Weights, Weights, Any]]]:
    return pool.run(start_and_end, JOBS, timeout=120)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job}-{job.case.optimizer}")
def test_it_is_what_torch_computes_with_all_experts(ends: Any, job: Job) -> None:
    ranks = [rank[JOBS.index(job)] for rank in ends]
    start = whole([rank[0] for rank in ranks[:2]])
    assert len([name for name in start if "experts" in name]) == 4 * EXPERTS
    assert_equal(start, whole([rank[0] for rank in ranks]))  # all begin as particle 0, its experts included
    first, second = (start[expert_name(number, 0, "weight")] for number in (0, 1))
    assert (first != second).any(), "experts were to differ"
    if job.ep_size == 2:
        assert len({name for name in ranks[0][0] if "experts" in name}) == 2 * EXPERTS, "a rank has half of them"
    for particle, expected in enumerate(trained_by_torch(job.case, start)):
        local_ranks = ranks[2 * particle : 2 * particle + 2]
        found = whole([rank[1] for rank in local_ranks])
        assert_close(found, expected)
        assert_equal(assemble([rank[2] for rank in local_ranks], found), found)  # each element has one owner


SHARED = Case(optimizer="SGD", lr=0.3, steps=5, particles=1, sync_mode="diloco")


@pytest.mark.parametrize("stage", slow_but([0], [0, 1, 2]))
def test_two_ranks_that_hold_the_same_experts_share_them_out(pool: Pool, stage: int) -> None:
    """One particle of four ranks, whose outer step is made on the owner of an element and then told to the other."""
    case = replace(SHARED, stage=stage, options={"outer_lr": 0.5, "outer_momentum": 0.0})
    ranks = [rank[0] for rank in pool.run(start_and_end, [Job(case)])]
    (expected,) = trained_by_torch(case, whole([rank[0] for rank in ranks]))
    found = whole([rank[1] for rank in ranks])
    assert_close(found, expected)
    assert_equal(assemble([rank[2] for rank in ranks], found), found)


# -- the same swarm, whose ranks hold all experts each ---------------------------------------------------

RANDOM = {"randomness": "per_tensor", "inertia": 0.2, "cognitive": 0.5}
ALIKE = [
    replace(SGD, sync_mode="pso", options=RANDOM),
    replace(SGD, sync_mode="diloco", options={"merge": "rda"}),
    replace(SGD, interval=4, steps=9, swarm={"fragments": 2, "streaming": True, "delay": 1}),
    replace(SGD, sync_mode="easgd", lr=0.1, momentum=0.9, swarm={"optimizer_state": "average"}),
]


@pytest.mark.parametrize("stage", slow_but([2], [0, 1, 2]))
def test_it_is_the_same_however_experts_are_spread(pool: Pool, stage: int) -> None:
    cases = [replace(case, stage=stage) for case in ALIKE]
    kinds = ["", "", "", "", "pyramid"]
    cases.append(cases[0])
    jobs = [Job(case, ep, kind) for case, kind in zip(cases, kinds, strict=True) for ep in (1, 2)]
    ranks = pool.run(start_and_end, jobs, timeout=120)
    for number in range(len(cases)):
        for particle in (slice(0, 2), slice(2, 4)):
            one, two = (whole([rank[2 * number + k][1] for rank in ranks[particle]]) for k in (0, 1))
            assert_close(two, one)


def test_at_every_step_it_is_one_world(pool: Pool) -> None:
    case = replace(SGD, interval=1)
    start, end, _ = zip(*(rank[0] for rank in pool.run(start_and_end, [Job(case)])), strict=True)
    expected = pool.run(one_world, Job(replace(case, sync_mode="allreduce")), whole([*start]))
    assert_close(whole(list(end)), whole(expected))


def one_world(job: Job, start: Weights) -> Weights:
    """The experts of the first two of four ranks, and the same ones on the others."""
    with ds_pso.init(config(job.case, 2)) as swarm:
        rank = swarm.world.layout.rank
        model = Net(job.ep_size, rank, 0)
        names = {name: name for name, _ in model.named_parameters()}
        for local in range(2):
            for name in list(names):
                if f"deepspeed_experts.{local}." in name:
                    number = rank % 2 * 2 + local
                    names[name] = name.replace(f"deepspeed_experts.{local}.", f"deepspeed_experts.{number}.")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(torch.from_numpy(start[names[name]]))
        engine = swarm.attach(build(job, swarm.ds_config, model))
        train(job.case, engine)
        return {names[name]: p.detach().numpy().copy() for name, p in engine.module.named_parameters()}


# -- half precision --------------------------------------------------------------------------------------

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
HALF = [
    Case(stage=0, precision="bf16"),
    Case(stage=0, precision="bf16", fused=True),
    Case(stage=1, precision="bf16", deepspeed=FP32_GRADIENTS),
    Case(stage=2, precision="bf16"),
    Case(stage=2, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
]


def masters_around_a_sync(jobs: list[Job]) -> list[Any]:
    found = []
    for job, swarm, engine in swarms(jobs):
        train(job.case, engine, range(3))  # one sync point and a step apart
        before = master_pieces(swarm)
        swarm.sync()
        found.append((before, master_pieces(swarm), working(swarm)))
    return found


@pytest.fixture(scope="module")
def syncs(pool: Pool) -> list[Any]:
    return pool.run(masters_around_a_sync, [Job(case) for case in HALF], timeout=120)


@pytest.mark.parametrize("number", range(len(HALF)), ids=lambda n: f"{HALF[n]}{'-fused' if HALF[n].fused else ''}")
def test_working_weights_are_the_cast_of_the_mean_of_the_masters(syncs: Any, number: int) -> None:
    ranks = [rank[number] for rank in syncs]
    like = whole([rank[2] for rank in ranks])
    one, two = (assemble([rank[0] for rank in ranks[k : k + 2]], like) for k in (0, 2))
    for particle in (ranks[:2], ranks[2:]):
        masters = assemble([rank[1] for rank in particle], like)
        assert_close(masters, {name: (one[name] + two[name]) / 2 for name in like}, rtol=1e-6, atol=1e-7)
        cast = {n: torch.from_numpy(value).to(HALF[number].dtype).float().numpy() for n, value in masters.items()}
        for rank in particle:
            assert_equal(rank[2], {name: cast[name] for name in rank[2]})


def spoil_an_expert(job: Job) -> Any:
    with ds_pso.init(config(job.case, 2)) as swarm:
        engine = swarm.attach(build(job, swarm.ds_config))
        train(job.case, engine, range(1))
        if swarm.world.layout.rank == 3:  # the second rank of particle 1
            shards = find_shards(engine)
            segment = next(s for s in shards.segments if s.name == expert_name(3, 0, "weight"))
            shards.tensors[segment.shard][segment.shard_start] = float("nan")
        swarm.sync()
        return working(swarm), swarm.last_sync.alive


@pytest.mark.parametrize("stage", slow_but([2], [0, 2]))
def test_an_expert_that_is_nan_costs_its_particle_the_sync(pool: Pool, stage: int) -> None:
    ranks = pool.run(spoil_an_expert, Job(Case(stage=stage, interval=8)))
    assert all(list(alive) == [True, False] for _, alive in ranks)
    whole([weights for weights, _ in ranks])  # all ranks have the same bits again
    assert all(np.isfinite(value).all() for weights, _ in ranks for value in weights.values())


# -- export, save, resume, other numbers of ranks --------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    pieces: list[Any]
    weights: Weights
    later: Weights
    parameters: int


def state_of(swarm: Swarm, job: Job) -> Saved:
    now = pieces(swarm), working(swarm)
    step = swarm.engine.global_steps
    train(job.case, swarm.engine, range(step, step + 3))
    return Saved(*now, working(swarm), swarm.session.start_record()["parameters"])


def export_and_save(jobs: list[Job], folder: Path) -> list[Saved]:
    found = []
    for number, (job, swarm, engine) in enumerate(swarms(jobs)):
        train(job.case, engine, range(3))
        for which in ("consensus", "best"):
            swarm.export(folder / str(number) / which, which)
        swarm.save(folder / str(number) / "checkpoints", background=number % 2 == 1)
        found.append(state_of(swarm, job))
    return found


def resume(jobs: list[Job], folder: Path, *, reshape: bool = False) -> list[Saved]:
    found = []
    for number, (job, swarm, _) in enumerate(swarms(jobs)):
        swarm.load(folder / str(number) / "checkpoints", reshape=reshape)
        found.append(state_of(swarm, job))
    return found


SAVED = [
    Job(Case(stage=0), ep_size=1),  # first: DeepSpeed counts the largest expert parallelism that there ever was
    Job(Case(stage=2, sync_mode="pso", options={"inertia": 0.3})),
    Job(Case(stage=1, precision="bf16", deepspeed=FP32_GRADIENTS)),
    Job(Case(stage=1), kind="frozen"),
    Job(Case(stage=2, sync_mode="diloco", swarm={"wire": "int8"}), kind="pyramid"),
    Job(Case(stage=0)),
]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Saved]]]:
    folder = tmp_path_factory.mktemp("experts")
    return folder, pool.run(export_and_save, SAVED, folder, timeout=120)


@pytest.mark.parametrize("number", range(len(SAVED)), ids=lambda number: str(SAVED[number]))
def test_all_experts_are_exported(saved: Any, number: int) -> None:
    folder, job, ranks = saved[0] / str(number), SAVED[number], [rank[number] for rank in saved[1]]
    like = whole([rank.weights for rank in ranks[:2]])
    assert ranks[1].parameters == sum(value.size for name, value in like.items() if not is_frozen(job, name))
    one, two = (assemble([masters(rank) for rank in ranks[k : k + 2]], like) for k in (0, 2))
    mean = {n: torch.from_numpy((one[n] + two[n]) / 2).to(job.case.dtype).float().numpy() for n in one}
    mean |= {name: value for name, value in like.items() if is_frozen(job, name)}
    found = load_file(folder / "consensus" / "model.safetensors")
    assert_close({name: value.float().numpy() for name, value in found.items()}, mean, rtol=1e-6, atol=1e-7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.moe.layer, "log_dist", lambda *_: None)
        (Pyramid if job.kind == "pyramid" else Net)(1, 0, 0).load_state_dict(found)  # with all experts


def masters(rank: Saved) -> list[Any]:
    return [piece for piece in rank.pieces if " of " not in piece[0]]


def is_frozen(job: Job, name: str) -> bool:
    return job.kind == "frozen" and "experts" in name and name.split(".")[-2] == "2"


@pytest.mark.parametrize("number", range(len(SAVED) - 1), ids=lambda number: str(SAVED[number]))
def test_the_model_in_a_checkpoint_is_the_exported_one(saved: Any, number: int) -> None:
    folder = saved[0] / str(number)
    for which in ("consensus", "best"):
        expected = load_file(folder / which / "model.safetensors")
        found = consolidate(find_checkpoint(folder), which).state_dict
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_at_zero_0_each_rank_has_an_optimizer_of_its_own(saved: Any) -> None:
    assert (SAVED[-1].case.stage, SAVED[-1].ep_size) == (0, 2)
    with pytest.raises(ds_pso.CheckpointError, match="under expert parallelism at ZeRO 0 each rank keeps a whole"):
        consolidate(find_checkpoint(saved[0] / str(len(SAVED) - 1)))


def test_resuming_is_bit_exact(pool: Pool, saved: Any) -> None:
    for before, after in zip(saved[1], pool.run(resume, SAVED, saved[0], timeout=120), strict=True):
        for was, now in zip(before, after, strict=True):
            for (name, start, values), expected in zip(now.pieces, was.pieces, strict=True):
                assert (name, start) == expected[:2]
                np.testing.assert_array_equal(values, expected[2], err_msg=name)
            assert_equal(now.weights, was.weights)
            assert_equal(now.later, was.later)


@pytest.mark.parametrize(
    ("particles", "size", "ep_size"),
    slow_but([(1, 4, 2), (2, 1, 1)], [(1, 4, 2), (2, 1, 1), (1, 4, 4), (1, 2, 2), (4, 1, 1)]),
)
def test_other_numbers_of_ranks_and_of_expert_parallelism(
    pool: Pool, saved: Any, particles: int, size: int, ep_size: int
) -> None:
    jobs = [Job(replace(job.case, particles=particles), min(ep_size, job.ep_size), job.kind) for job in SAVED[:-1]]
    if ep_size == 1:  # layers of one ep_size have one parameter group; the pyramid was saved with two
        jobs.pop()
    ranks = pool.run(reshape, jobs, saved[0], world_size=particles * size, timeout=120)
    for number in range(len(jobs)):
        before, after = [rank[number] for rank in saved[1]], [rank[number] for rank in ranks]
        for particle in range(particles):
            was, now = before[particle % 2 * 2 :][:2], after[particle * size : (particle + 1) * size]
            weights = whole([rank.weights for rank in was])
            assert_equal(whole([rank.weights for rank in now]), weights)
            like = {kind + name: value for kind in ("", "0 of ", "1 of ") for name, value in weights.items()}
            expected = assemble([rank.pieces for rank in was], like)
            assert any(name.startswith("1 of ") and "experts.3" in name for name in expected)
            assert_equal(assemble([rank.pieces for rank in now], like), expected)
            assert all(np.isfinite(value).all() for rank in now for value in rank.later.values())


def reshape(jobs: list[Job], folder: Path) -> list[Saved]:
    return resume(jobs, folder, reshape=True)


# -- expert load -----------------------------------------------------------------------------------------


def load_at_each_sync(job: Job) -> tuple[list[list[float]], list[tuple[float, ...]]]:
    """Tokens of this rank that went to each expert before each sync, as the layer says; and what is recorded."""
    tokens, seen, found = torch.zeros(EXPERTS), [], []

    def add(layer: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if layer.training:
            tokens.add_(output[2])

    with ds_pso.init(config(job.case, place(job.case)[2])) as swarm:
        engine = swarm.attach(build(job, swarm.ds_config))
        engine.module.moe.register_forward_hook(add)
        swarm.on_sync(lambda record: found.append(tuple(record.expert_load_distances)))
        for step in range(job.case.steps):
            train(job.case, engine, range(step, step + 1))
            engine.eval()
            with torch.no_grad():
                engine(torch.ones(3, 7))  # an evaluation does not count
            engine.train()
            if (step + 1) % job.case.interval == 0:
                seen.append(tokens.tolist())
                tokens.zero_()
        swarm.finish_pending()
        return seen, found


@pytest.mark.parametrize("delay", [0, 1])
def test_the_record_says_how_far_routers_are_apart(pool: Pool, delay: int) -> None:
    case = replace(SGD, steps=4, swarm={"expert_load": True, "delay": delay})
    ranks = pool.run(load_at_each_sync, Job(case))
    assert [len(values) for rank in ranks for values in rank] == [2] * 8
    for sync in (0, 1):
        counts = np.array([seen[sync] for seen, _ in ranks]).reshape(2, 2, EXPERTS).sum(1)
        assert (counts.sum(1) == 2 * 8).all(), "two steps of eight rows"
        shares = counts / counts.sum(1, keepdims=True)
        expected = np.abs(shares - shares.mean(0)).sum(1) / 2
        assert (expected > 0).all()
        for _, found in ranks:
            np.testing.assert_allclose(found[sync], expected, rtol=1e-12)


def attach_a_dense_model(case: Case) -> None:
    with swarm_of(case):
        pass


def test_a_model_without_routers_has_no_expert_load(pool: Pool) -> None:
    for outcome in pool.outcomes(attach_a_dense_model, Case(swarm={"expert_load": True})):
        assert outcome.kind == "ConfigError", outcome
        assert "swarm.expert_load = true: the model has no router" in outcome.text


# -- what is refused -------------------------------------------------------------------------------------


def attach_refused(job: Job, what: str) -> None:
    with ds_pso.init(config(job.case, 2)) as swarm:
        rank = swarm.world.layout.shard_rank
        model = Net(job.ep_size, rank, 0)
        experts = model.moe.deepspeed_moe.experts.deepspeed_experts
        if what == "buffers":
            experts[0][1].register_buffer("seen", torch.zeros(3))
        if what == "frozen":
            experts[1][2].requires_grad_(False)
        if what == "trained":
            experts[0].requires_grad_(rank == 0)
        parameters: list[Any] = [*model.parameters()]
        if what == "one group":
            deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW  # the real one needs a compiler and a GPU
            parameters = [{"params": parameters, "name": "all", "moe": False}]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=swarm.ds_config)
        swarm.attach(engine)


@pytest.mark.parametrize(
    ("what", "case", "text"),
    [
        ("buffers", Case(), "its experts have buffers (moe.deepspeed_moe.experts.deepspeed_experts.0.1.seen)"),
        ("frozen", Case(), "experts of moe.deepspeed_moe.experts.deepspeed_experts are not trained, and at ZeRO 2"),
        (
            "trained",
            Case(stage=1),
            "of one layer some experts are trained and some are not, and not the same ones on all",
        ),
        ("one group", Case(stage=0, precision="bf16", fused=True), "holds experts and other parameters; divide it"),
    ],
)
def test_what_cannot_be_one_model_is_refused(pool: Pool, what: str, case: Case, text: str) -> None:
    for outcome in pool.outcomes(attach_refused, Job(case), what):
        assert (outcome.kind, text in outcome.text) == ("UnsupportedError", True), outcome
