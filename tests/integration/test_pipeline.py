"""A particle may be a pipeline: ``train_batch`` is a step, stages sync with the same stages of their peers.

P x S = 2 x 2, as one stage with two data-parallel ranks or as two stages; and 2 x 4 as two stages of two ranks each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import RepeatingLoader
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from variants import slow_but

import ds_pso
from ds_pso.export.offline import consolidate
from ds_pso.metrics.log import read_metrics
from ds_pso.swarm import Swarm

from .jobs import (
    Case,
    Weights,
    assemble,
    assert_close,
    assert_equal,
    build_engine,
    config,
    master_pieces,
    optimizer_state,
    particle_batch,
    place,
    rank_batches,
    working_weights,
)
from .test_publish import cast

TIED = "tied_modules.ends.weight"


# -- the model, as a pipeline and plain -------------------------------------------------------------


def backwards(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight


def layers(tied: bool, more: Sequence[LayerSpec] = ()) -> list[LayerSpec]:
    """Two stages get about as many parameters each.

    Args:
        more: layers that come before the last ones.
    """
    if tied:
        first = TiedLayerSpec("ends", nn.Linear, 7, 5, bias=False)
        last = TiedLayerSpec("ends", nn.Linear, 7, 5, bias=False, forward_fn=backwards)
        return [first, LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 5, 5), *more, last, LayerSpec(nn.Linear, 7, 3)]
    ends = [LayerSpec(nn.Linear, 7, 5), LayerSpec(nn.Linear, 5, 3)]
    return [ends[0], LayerSpec(nn.Tanh), LayerSpec(nn.LayerNorm, 5), LayerSpec(nn.Linear, 5, 5), *more, ends[1]]


class Plain(nn.Module):
    """The same layers in one piece, under the names that PipelineModule gives them."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.tied_modules = nn.ModuleDict()
        for number, spec in enumerate(specs):
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()
                layer = self.tied_modules[spec.key]
                self.steps.append(layer if spec.forward_fn is None else lambda x, of=layer: backwards(of, x))
            else:
                self.add_module(str(number), spec.build())
                self.steps.append(getattr(self, str(number)))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def plain_model(weights: Weights, tied: bool) -> Plain:
    model = Plain(layers(tied))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.float(), target)


def train_plain(case: Case, start: Weights, tied: bool) -> tuple[list[Weights], list[list[float]]]:
    """Local SGD in one process: final weights and losses of each particle."""
    models = [plain_model(start, tied) for _ in range(int(case.particles))]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=case.lr) for model in models]
    losses: list[list[float]] = [[] for _ in models]
    for step in range(case.steps):
        for particle, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = particle_batch(particle, step)
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            losses[particle].append(loss.item())
        if (step + 1) % case.interval == 0:
            with torch.no_grad():
                for copies in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(list(copies)).mean(0)
                    for copy in copies:
                        copy.copy_(mean)
    found = [{name: p.detach().numpy().copy() for name, p in model.named_parameters()} for model in models]
    return found, losses


# -- a swarm of pipelines -----------------------------------------------------------------------------


@contextlib.contextmanager
def pipelines(
    case: Case,
    stages: int,
    *,
    tied: bool = False,
    more: Sequence[LayerSpec] = (),
    data: Any = None,
    attach: bool = True,
    **init: Any,
) -> Iterator[tuple[Swarm, Any]]:
    with ds_pso.init(config(case, place(case)[2] // stages), **init) as swarm:
        deepspeed.init_distributed("gloo")
        torch.manual_seed(swarm.world.layout.rank)  # each rank other weights, until they are made equal
        module = PipelineModule(layers(tied, more), num_stages=stages, loss_fn=loss_of)
        if data is None:
            engine = build_engine(case, swarm.ds_config, module)
        else:
            parameters = list(module.parameters())
            engine, *_ = deepspeed.initialize(
                model=module, model_parameters=parameters, training_data=data, config=swarm.ds_config
            )
        if attach:
            swarm.attach(engine, probe=probe_of(case, engine) if case.probe else None)
        yield swarm, engine


def batches(case: Case, engine: Any, particle: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of a data-parallel rank; the same for all stages."""
    rank, size = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    for x, y in rank_batches(case, particle, rank, size, step):
        yield x.to(case.dtype), y


def probe_of(case: Case, engine: Any) -> Any:
    return lambda index: engine.eval_batch(batches(case, engine, -1, index))


def train(case: Case, engine: Any, steps: range | None = None) -> list[float]:
    particle = place(case)[0]
    steps = range(case.steps) if steps is None else steps
    return [float(engine.train_batch(batches(case, engine, particle, step))) for step in steps]


def final(case: Case, stages: int, tied: bool) -> dict[str, Any]:
    with pipelines(case, stages, tied=tied) as (swarm, engine):
        start = working_weights(engine)
        losses = train(case, engine)
        return {
            "start": start,
            "weights": working_weights(engine),
            "losses": losses,
            "syncs": swarm.totals.count,
            "known": list(swarm.last_losses),
        }


def merged(ranks: list[dict[str, Any]], key: str = "weights") -> Weights:
    """The model of a particle, from all its stages."""
    model: Weights = {}
    for rank in ranks:
        for name, value in rank[key].items():
            if name in model:
                np.testing.assert_array_equal(value, model[name], err_msg=name)
            model[name] = value
    return model


FP32 = Case(accumulate=2, steps=5)
SHAPES = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (1, 2, 2), (0, 2, 4), (1, 2, 4)]  # ZeRO stage, pipeline stages, S


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("zero", "stages", "size"), slow_but([(0, 2, 2), (1, 1, 2)], SHAPES))
def test_it_is_what_plain_torch_computes(pool: Pool, zero: int, stages: int, size: int, tied: bool) -> None:
    case = replace(FP32, stage=zero, accumulate=2 if size == 2 else 1)
    ranks = pool.run(final, case, stages, tied, world_size=2 * size)
    particles = [ranks[:size], ranks[size:]]
    start = merged(particles[0], "start")
    assert_equal(merged(particles[1], "start"), start)
    assert len(start) == len(list(Plain(layers(tied)).named_parameters()))
    expected, losses = train_plain(case, start, tied)
    for particle, own in enumerate(particles):
        assert_close(merged(own), expected[particle])
        for rank in own:
            assert rank["losses"] == own[0]["losses"], "all ranks of a particle know its loss"
            assert (rank["syncs"], rank["known"]) == (2, ranks[0]["known"])
        np.testing.assert_allclose(own[0]["losses"], losses[particle], rtol=2e-5)
        np.testing.assert_allclose(ranks[0]["known"][particle], np.mean(losses[particle][2:4]), rtol=2e-5)


# -- publishing -----------------------------------------------------------------------------------------


def around_a_sync(case: Case, stages: int) -> dict[str, Any]:
    with pipelines(case, stages) as (swarm, engine):
        train(case, engine, range(2))
        result: dict[str, Any] = {"before": master_pieces(swarm), "like": working_weights(engine)}
        swarm.sync()
        result |= {"after": master_pieces(swarm), "weights": working_weights(engine)}
        data = list(batches(case, engine, 0, 99))
        _, output = engine.eval_batch(iter(data[:1]), num_micro_batches=1, return_logits=True)
        result["input"] = data[0][0].float().numpy()
        result["output"] = None if output is None else output.detach().float().numpy()
        result["losses"] = train(case, engine, range(2, 4))
        return result


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed's BF16_Optimizer
PRECISIONS: list[tuple[int, int, str, dict[str, Any]]] = [
    *[(zero, stages, precision, {}) for zero in (0, 1) for stages in (1, 2) for precision in ("fp32", "fp16")],
    *[(1, stages, "bf16", more) for stages in (1, 2) for more in ({}, FP32_ACCUMULATION)],
]


@pytest.mark.parametrize(
    ("zero", "stages", "precision", "more"),
    slow_but([(0, 2, "fp16", {}), (1, 1, "bf16", {}), (1, 2, "bf16", FP32_ACCUMULATION)], PRECISIONS),
)
def test_working_weights_are_the_cast_of_the_masters(
    pool: Pool, zero: int, stages: int, precision: str, more: dict[str, Any]
) -> None:
    case = Case(stage=zero, precision=precision, accumulate=2, interval=100, deepspeed=more)
    ranks = pool.run(around_a_sync, case, stages)
    particles = [ranks[:2], ranks[2:]]
    like = merged(particles[0], "weights")
    before = [assemble([rank["before"] for rank in own], like) for own in particles]
    mean = {name: (before[0][name] + before[1][name]) / 2 for name in like}
    assert any((before[0][name] != before[1][name]).any() for name in like), "the particles never went apart"
    for own in particles:
        masters = assemble([rank["after"] for rank in own], like)
        assert_close(masters, mean, rtol=1e-6, atol=1e-7)
        assert_equal(merged(own), cast(masters, case.dtype))
        for rank in own:
            assert np.isfinite(rank["losses"]).all()
            if rank["output"] is not None:
                model, x = plain_model(merged(own), tied=False).to(case.dtype), torch.from_numpy(rank["input"])
                np.testing.assert_array_equal(rank["output"], model(x.to(case.dtype)).detach().float().numpy())
        assert own[-1]["output"] is not None


# -- tied weights -----------------------------------------------------------------------------------------

APART: dict[str, Case] = {
    "int4": Case(stage=1, interval=1, sync_mode="diloco", swarm={"wire": "int4"}),
    "streaming": Case(
        stage=0, interval=2, sync_mode="easgd", steps=6, swarm={"delay": 1, "fragments": 2, "streaming": True}
    ),
}


def ends_after_each_step(case: Case) -> list[np.ndarray]:
    with pipelines(case, 2, tied=True) as (swarm, engine):
        found = []
        for step in range(case.steps):
            train(case, engine, range(step, step + 1))
            shards = swarm.session.synchronizer.parts.shards
            masters = [shards.tensors[s.shard][s.shard_start :][: s.numel] for s in shards.segments if s.name == TIED]
            found.append(torch.cat(masters).numpy().copy())
        return [*found, working_weights(engine)[TIED].ravel()]


@pytest.mark.parametrize("name", APART)
def test_tied_weights_stay_tied(pool: Pool, name: str) -> None:
    ranks = pool.run(ends_after_each_step, APART[name])
    for own in (ranks[:2], ranks[2:]):
        for first, last in zip(*own, strict=True):
            assert np.isfinite(first).all()
            np.testing.assert_array_equal(first, last)


# -- other parts of a swarm ---------------------------------------------------------------------------


def lose_a_stage(case: Case) -> dict[str, Any]:
    """Particle 1 has a NaN in the weights of its last stage alone."""
    with pipelines(case, 2) as (swarm, engine):
        train(case, engine, range(1))
        if swarm.particle == 1 and engine.is_last_stage():
            swarm.session.synchronizer.parts.shards.tensors[0][0] = torch.nan
        swarm.sync()
        return {"alive": list(swarm.last_sync.alive), "weights": working_weights(engine)}


def test_a_particle_is_lost_with_one_of_its_stages(pool: Pool) -> None:
    ranks = pool.run(lose_a_stage, Case(stage=1, accumulate=2, interval=100))
    for rank in ranks:
        assert rank["alive"] == [True, False]
    assert_equal(merged(ranks[2:]), merged(ranks[:2]))


def search_a_line(case: Case) -> dict[str, Any]:
    with pipelines(case, 2) as (swarm, engine):
        train(case, engine)
        return {"weights": working_weights(engine), "note": dict(swarm.last_sync.note)}


def test_what_is_tried_is_scored_by_eval_batch(pool: Pool) -> None:
    ranks = pool.run(search_a_line, Case(stage=1, accumulate=2, sync_mode="line_search", probe=True))
    for rank in ranks:
        assert rank["note"] == ranks[0]["note"]
        assert np.isfinite(rank["note"]["scores"]).all()
    assert_equal(merged(ranks[2:]), merged(ranks[:2]))


def start_record(case: Case, run_dir: Path) -> None:
    with pipelines(case, 2, run_dir=run_dir):
        pass


def test_parameters_are_counted_in_all_stages(pool: Pool, tmp_path: Path) -> None:
    pool.run(start_record, Case(stage=0), tmp_path)
    (start,) = [event for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "start"]
    assert start["parameters"] == sum(p.numel() for p in Plain(layers(tied=False)).parameters())


# -- data -----------------------------------------------------------------------------------------------


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.arange(44.0)[:, None].expand(44, 7), torch.randn(44, 3, generator=generator))


def seen_of_sampler(case: Case, stages: int) -> list[int]:
    with pipelines(case, stages) as (swarm, _):
        return list(swarm.sampler(dataset()))


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_see_the_same_samples_and_particles_others(pool: Pool, stages: int) -> None:
    ranks = pool.run(seen_of_sampler, Case(stage=0, accumulate=2), stages)
    parts = [tuple(rank) for rank in ranks]
    assert len(set(parts)) == 4 // stages
    for own in (parts[:2], parts[2:]):
        assert len(set(own)) == 2 // stages
    whole = [index for part in set(parts) for index in part]
    assert len(whole) == len(set(whole)) == 40


def seen_in_training(case: Case) -> tuple[list[float], list[list[float]], int, bool]:
    """What the first stage saw of the data that DeepSpeed was given, and the last of the labels."""
    with pipelines(case, 2, data=dataset()) as (swarm, engine):
        inputs: list[float] = []
        labels: list[list[float]] = []
        real = engine.module.loss_fn
        engine.module.loss_fn = lambda output, target: labels.extend(target.tolist()) or real(output, target)
        if engine.is_first_stage():
            engine.module.register_forward_pre_hook(lambda _, args: inputs.extend(args[0][:, 0].tolist()))
        for _ in range(2):
            engine.train_batch()
        place_in_data = swarm.session.samplers[0].state_dict()["batch"]
        return inputs, labels, place_in_data, bool(swarm.last_sync.same_samples)


def test_training_data_of_deepspeed_is_split_over_the_particles(pool: Pool) -> None:
    ranks = pool.run(seen_in_training, Case(stage=1, accumulate=2))
    data = dataset().tensors[1]
    seen = []
    for first, last in (ranks[:2], ranks[2:]):
        inputs, labels = [int(index) for index in first[0]], last[1]
        assert labels == data[inputs].tolist(), "inputs and labels belong together"
        seen += inputs
        assert first[2:] == last[2:] == (4, False), "micro-batches of four samples"
    assert len(seen) == len(set(seen)) == 32


def train_on_the_same(case: Case) -> list[Any]:
    with pipelines(case, 2) as (swarm, engine):
        for step in range(2):
            engine.train_batch(batches(case, engine, 0, step))
        return [list(group) for group in swarm.last_sync.same_samples]


@pytest.mark.filterwarnings("ignore:the batches of particles")
def test_particles_that_train_on_the_same_samples_are_noticed(pool: Pool) -> None:
    assert pool.run(train_on_the_same, Case(stage=0, accumulate=2)) == [[[0, 1]]] * 4


# -- checkpoints ----------------------------------------------------------------------------------------


def train_from_loader(case: Case, stages: int, steps: int, folder: Path, stop: int | None, tied: bool) -> Any:
    """Train up to step ``steps``; save at step ``stop``, or load first if there is none."""
    with pipelines(case, stages, tied=tied) as (swarm, engine):
        data, size = dataset(), engine.train_micro_batch_size_per_gpu()
        sampler = swarm.sampler(data)
        loader = iter(RepeatingLoader(DataLoader(data, batch_size=size, sampler=sampler)))
        moved = ((x.to(case.dtype) / 44, y) for x, y in loader)
        if stop is None:
            assert swarm.load(folder) == engine.global_steps
        losses = []
        while engine.global_steps < steps:
            losses.append(float(engine.train_batch(moved)))
            if engine.global_steps == stop:
                swarm.save(folder)
        swarm.world.background.settle()
        states = swarm.session.synchronizer.parts.updater.state
        return {
            "weights": working_weights(engine),
            "moments": optimizer_state(engine),
            "rule": {f"{i}.{k}": v.numpy().copy() for i, kept in enumerate(states) for k, v in kept.items()},
            "numbers": [losses[-2:], sampler.state_dict(), list(swarm.last_losses), swarm.session.window.state()],
        }


RESUMED = [
    ("diloco", 0, 2, "fp32", False),
    ("diloco", 0, 2, "fp16", False),
    ("diloco", 1, 2, "bf16", True),
    ("pso", 1, 1, "bf16", False),
]


@pytest.mark.parametrize(("rule", "zero", "stages", "precision", "tied"), slow_but(RESUMED[1:3], RESUMED))
def test_a_run_goes_on_bit_for_bit(
    pool: Pool, tmp_path: Path, rule: str, zero: int, stages: int, precision: str, tied: bool
) -> None:
    case = Case(stage=zero, precision=precision, sync_mode=rule, accumulate=2)
    whole = pool.run(train_from_loader, case, stages, 7, tmp_path, 5, tied)
    resumed = pool.run(train_from_loader, case, stages, 7, tmp_path, None, tied)
    for there, here in zip(whole, resumed, strict=True):
        for key in ("weights", "moments", "rule"):
            assert_equal(here[key], there[key])
        assert here["numbers"] == there["numbers"]


def resume_as(case: Case, stages: int, folder: Path, reshape: bool) -> None:
    with pipelines(case, stages) as (swarm, _):
        swarm.load(folder, reshape=reshape)


def save_at_once(case: Case, folder: Path) -> None:
    with pipelines(case, 2) as (swarm, engine):
        train(case, engine, range(1))
        swarm.save(folder)


def test_what_only_as_many_stages_can_read(pool: Pool, tmp_path: Path) -> None:
    case = Case(stage=1, accumulate=2)
    pool.run(save_at_once, case, tmp_path)
    for outcome in pool.outcomes(resume_as, case, 1, tmp_path, False):
        assert outcome.kind == "CheckpointError", outcome
        assert "saved with model" in outcome.text
    for outcome in pool.outcomes(resume_as, replace(case, particles=1), 2, tmp_path, True, world_size=2):
        assert outcome.kind == "CheckpointError", outcome
        assert "holds the layers of a pipeline engine" in outcome.text
    with pytest.raises(ds_pso.CheckpointError, match="holds the layers of a pipeline engine"):
        consolidate(tmp_path / "step_00000001")


# -- export -----------------------------------------------------------------------------------------------


class Counting(nn.Linear):
    """A layer with a buffer that is averaged and a counter that is not."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().float().abs().mean()
        self.steps += 1
        return super().forward(x)


def exported(case: Case, stages: int, folder: Path, tied: bool) -> dict[str, Any]:
    with pipelines(case, stages, tied=tied, more=[LayerSpec(Counting)]) as (swarm, engine):
        train(case, engine)
        swarm.export(folder)
        with swarm.consensus():
            return {"weights": working_weights(engine)}


@pytest.mark.parametrize(("stages", "precision"), slow_but([(2, "bf16")], [(1, "fp32"), (2, "fp32"), (2, "bf16")]))
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_has_the_layers_of_all_stages(
    pool: Pool, tmp_path: Path, stages: int, precision: str, tied: bool
) -> None:
    case = Case(stage=1, precision=precision, accumulate=2, steps=3)
    ranks = pool.run(exported, case, stages, tmp_path, tied)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(Plain(layers(tied, [LayerSpec(Counting)])).state_dict())
    assert found["0.weight" if not tied else TIED].dtype == case.dtype
    assert_equal({name: value.float().numpy() for name, value in found.items()}, merged(ranks[:stages]))


# -- what is refused --------------------------------------------------------------------------------------


def sample_too_early(case: Case, folder: Path) -> None:
    with pipelines(case, 2, attach=False) as (swarm, engine):
        swarm.sampler(dataset())
        swarm.attach(engine)


def keep_lengths(case: Case, folder: Path) -> None:
    with pipelines(replace(case, sync_mode="diloco", options={"merge": "rda"}), 2):
        pass


def round_moments(case: Case, folder: Path) -> None:
    with pipelines(replace(case, swarm={"optimizer_state": "average", "moments": {"wire": "bf16"}}), 2):
        pass


def half_precision(case: Case, folder: Path) -> None:
    with pipelines(replace(case, precision="bf16"), 2):
        pass


def count_tokens(case: Case, folder: Path) -> None:
    with pipelines(replace(case, swarm={"expert_load": True}), 2):
        pass


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (count_tokens, "UnsupportedError", "swarm.expert_load = true: each stage of a pipeline has routers of its own"),
        (half_precision, "UnsupportedError", "DeepSpeed cannot load what it saves of a pipeline in bf16 at ZeRO 0"),
        (sample_too_early, "SwarmError", "swarm.sampler was called before swarm.attach"),
        (round_moments, "UnsupportedError", 'swarm.moments.wire = "bf16": stages of a pipeline may share a weight'),
        (keep_lengths, "UnsupportedError", 'swarm.diloco.merge = "rda": all ranks of a particle must hold a part'),
    ],
)
def test_what_is_refused(pool: Pool, tmp_path: Path, body: Any, kind: str, text: str) -> None:
    for outcome in pool.outcomes(body, Case(stage=0), tmp_path):
        assert (outcome.kind, text in outcome.text) == (kind, True), outcome
