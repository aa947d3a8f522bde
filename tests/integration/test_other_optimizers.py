"""Optimizers of other libraries, given to ``deepspeed.initialize``: synced, resumed, reset, averaged and exported."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from variants import slow_but

import ds_pso
from ds_pso.errors import CheckpointError, SwarmError
from ds_pso.export.offline import consolidate
from ds_pso.swarm import Swarm

from .jobs import Case, Weights, assert_close, assert_equal, build_model, config, place, train, working_weights

STEPS = 5


@dataclass(frozen=True)
class Other:
    """An optimizer of another library; ``without_mean``: state that keeps it from being averaged, by ZeRO stage."""

    module: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    without_mean: dict[int, str] = field(default_factory=dict)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.module.startswith("torchao"):
            torch.compiler.set_stance("force_eager")  # it would compile its step
        optimizer = getattr(importlib.import_module(self.module), self.name)(model.parameters(), **self.options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


OTHERS: dict[str, Other] = {
    "schedulefree-adamw": Other("schedulefree", "AdamWScheduleFree", {"lr": 0.02, "warmup_steps": 2}),
    "schedulefree-sgd": Other("schedulefree", "SGDScheduleFree", {"lr": 0.1}),
    "schedulefree-radam": Other("schedulefree", "RAdamScheduleFree", {"lr": 0.02}),
    "prodigy": Other("prodigyopt", "Prodigy", {"d0": 0.01}, {0: "s", 2: "s"}),
    "lion": Other("lion_pytorch", "Lion", {"lr": 0.003}),
    "adafactor": Other("transformers.optimization", "Adafactor", {}, {0: "exp_avg_sq_row"}),
    "adafactor-with-a-rate": Other(
        "transformers.optimization",
        "Adafactor",
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
        {0: "exp_avg_sq_row"},
    ),
    "bitsandbytes-8bit": Other(
        "bitsandbytes.optim", "Adam8bit", {"lr": 0.02, "min_8bit_size": 1}, {0: "state1", 2: "state1"}
    ),
    "torchao-8bit": Other("torchao.optim", "AdamW8bit", {"lr": 0.02}, {0: "exp_avg", 2: "exp_avg"}),
}
ALWAYS = ("schedulefree-adamw", "adafactor")


def variants(*always: str) -> list[Any]:
    return slow_but([(name, 2) for name in always], [(name, stage) for name in OTHERS for stage in (0, 2)])


def need(name: str) -> Other:
    pytest.importorskip(OTHERS[name].module)
    return OTHERS[name]


class Wide(nn.Module):
    """Of sizes that torchao quantises: at least 4096 elements, in whole blocks of 256, on each of two ranks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 1024, bias=False), nn.Linear(1024, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def engine_with(case: Case, swarm: Swarm, other: Other, weights: Weights | None = None) -> tuple[Any, Any]:
    model = Wide() if other.module.startswith("torchao") else build_model(case)
    if weights is not None:
        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    optimizer = other.build(model)
    ds_config = {key: value for key, value in swarm.ds_config.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine, optimizer


def everything(engine: Any) -> Weights:
    """Working weights, and all that the optimizer keeps of masters and of its groups."""
    found = working_weights(engine)
    optimizer = engine.basic_optimizer
    for number, state in enumerate(filter(None, optimizer.state.values())):
        for name, value in state.items():
            flat = value.dequantize() if type(value) is not Tensor and isinstance(value, Tensor) else value
            found[f"{number}.{name}"] = torch.as_tensor(flat).detach().float().numpy().copy()
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, int | float):
                found[f"group.{number}.{name}"] = np.array(value)
    return found


def until(case: Case, other: Other, folder: Path, stop: int, load: bool) -> Any:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        swarm.attach(engine)
        if load:
            swarm.load(folder)
        losses = train(case, engine, range(engine.global_steps, stop))
        swarm.save(folder)
        return losses, everything(engine)


@pytest.mark.parametrize(("name", "stage"), variants(*ALWAYS))
def test_a_run_goes_on_bit_for_bit(pool: Pool, tmp_path: Path, name: str, stage: int) -> None:
    other, case = need(name), Case(stage=stage)
    expected = pool.run(until, case, other, tmp_path / "whole", STEPS, False)
    pool.run(until, case, other, tmp_path / "parts", 3, False)
    if (name, stage) == ("torchao-8bit", 0):  # DeepSpeed's way to read the file is not for tensors of other classes
        for outcome in pool.outcomes(until, case, other, tmp_path / "parts", STEPS, True):
            assert outcome.kind == "CheckpointError", outcome
            assert "Callable map_location not supported" in outcome.text
        return
    for rank, (_, found) in enumerate(pool.run(until, case, other, tmp_path / "parts", STEPS, True)):
        assert_equal(found, expected[rank][1])
    assert all(math.isfinite(loss) for loss in expected[0][0])


def synced_alike(case: Case, other: Other) -> Any:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(2))
        return working_weights(engine)


@pytest.mark.parametrize(("name", "stage"), variants(*ALWAYS))
def test_particles_are_equal_after_a_sync(pool: Pool, name: str, stage: int) -> None:
    ranks = pool.run(synced_alike, Case(stage=stage), need(name))
    for weights in ranks[1:]:
        assert_equal(weights, ranks[0])


def reset_and_new(case: Case, other: Other) -> Any:
    """Steps after a sync that resets, and those of a new optimizer from the weights that it left."""
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(3))
        new, _ = engine_with(case, swarm, other, working_weights(engine))
        for step in (3, 4):  # before the next sync
            train(case, engine, range(step, step + 1))
            train(case, new, range(step, step + 1))
        return everything(engine), everything(new)


@pytest.mark.parametrize(("name", "stage"), variants(*ALWAYS))
def test_a_reset_optimizer_is_a_new_one(pool: Pool, name: str, stage: int) -> None:
    case = Case(stage=stage, interval=3, swarm={"optimizer_state": "reset"})
    for mine, expected in pool.run(reset_and_new, case, need(name)):
        assert_equal(mine, expected)


@pytest.mark.parametrize(("name", "stage"), variants(*ALWAYS))
def test_its_state_is_averaged_or_refused(pool: Pool, name: str, stage: int) -> None:
    other, case = need(name), Case(stage=stage, swarm={"optimizer_state": "average"})
    outcomes = pool.outcomes(averaged, case, other)
    if stage in other.without_mean:
        for outcome in outcomes:
            assert outcome.kind == "SwarmError", outcome
            assert (
                f'swarm.optimizer_state = "average": {other.name} keeps \'{other.without_mean[stage]}' in outcome.text
            )
        return
    ranks = [outcome.get() for outcome in outcomes]
    for mine, theirs in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
        (before, after), (their_before, their_after) = mine, theirs
        own = {key for key in after if "." in key and not key.startswith(("group", *working_names()))}
        moments = {key for key in own if after[key].size > 1}
        assert moments
        for key in moments:
            np.testing.assert_array_equal(after[key], their_after[key], err_msg=key)
            assert (before[key] != their_before[key]).any(), f"{key} never differed"
            np.testing.assert_allclose(after[key], (before[key] + their_before[key]) / 2, rtol=1e-6, atol=1e-12)


def working_names() -> tuple[str, ...]:
    return ("first", "norm", "last", "scale")


def averaged(case: Case, other: Other) -> Any:
    case = replace(case, interval=100)
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(8))  # RAdam moves nothing in its first ones
        before = everything(engine)
        swarm.sync()
        return before, everything(engine)


# -- schedule-free: two kinds of weights ------------------------------------------------------------

SGD = Other("schedulefree", "SGDScheduleFree", {"lr": 0.1})
ADAMW = OTHERS["schedulefree-adamw"]


def at_every_step(case: Case, other: Other) -> Any:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(4))
        return working_weights(engine)


def test_means_of_all_that_is_linear_are_those_of_training_together(pool: Pool) -> None:
    """Of SGD both sequences are sums of gradients: their means at every step are those of one large batch."""
    need("schedulefree-sgd")
    together = pool.run(at_every_step, Case(seed=0, sync_mode="allreduce", particles=2), SGD)[0]
    for what in ("average", "keep"):
        for weights in pool.run(at_every_step, Case(seed=0, interval=1, swarm={"optimizer_state": what}), SGD):
            assert_close(weights, together, rtol=1e-4, atol=1e-6)


def evaluated(case: Case, other: Other, folder: Path) -> Any:
    """What is exported and evaluated; and the weights to evaluate, as the optimizer itself makes them."""
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, optimizer = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(3))
        before = everything(engine)
        swarm.export(folder / "model")
        with swarm.consensus():
            inside = working_weights(engine)
        assert_equal(everything(engine), before)
        swarm.save(folder / "training")
        shards = swarm.session.synchronizer.parts.shards
        optimizer.eval()
        with pytest.raises(SwarmError, match=r"call optimizer.train\(\) before the sync"):
            swarm.sync()
        tensors = shards.tensors
        mine = [
            (s.name, s.param_start, tensors[s.shard][s.shard_start : s.shard_start + s.numel].numpy().copy())
            for s in shards.segments
        ]
        swarm.save(folder / "evaluation")
        return mine, inside


@pytest.mark.parametrize("stage", slow_but([2], [0, 2]))
def test_what_is_evaluated_and_exported(pool: Pool, tmp_path: Path, stage: int) -> None:
    need("schedulefree-adamw")
    ranks = pool.run(evaluated, Case(stage=stage), ADAMW, tmp_path)
    found = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in found.items():
        whole = np.zeros((2, tensor.numel()), np.float32)
        for rank, (pieces, inside) in enumerate(ranks):
            np.testing.assert_array_equal(inside[name], tensor.numpy())
            for piece, start, values in pieces:
                if piece == name:
                    whole[rank // 2, start : start + values.size] = values
        np.testing.assert_allclose(tensor.numpy().ravel(), whole.mean(0), rtol=1e-6, atol=1e-7, err_msg=name)
    with pytest.raises(CheckpointError, match="saved while a schedule-free optimizer trained"):
        consolidate(tmp_path / "training" / "step_00000003")
    offline = consolidate(tmp_path / "evaluation" / "step_00000003").state_dict
    for name, tensor in found.items():
        torch.testing.assert_close(offline[name], tensor, rtol=1e-6, atol=1e-7)


def late_in_eval_mode(case: Case, other: Other) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, optimizer = engine_with(case, swarm, other)
        swarm.attach(engine)
        train(case, engine, range(2))
        optimizer.eval()
        with pytest.raises(SwarmError, match=r"call optimizer.train\(\) before the sync"):
            swarm.finish_pending()
        optimizer.train()
        swarm.finish_pending()
        assert swarm.totals.count == 1


def test_what_comes_late_does_not_move_the_weights_to_evaluate(pool: Pool) -> None:
    need("schedulefree-adamw")
    pool.run(late_in_eval_mode, Case(swarm={"delay": 2}), ADAMW)


def warned(case: Case, other: Other) -> None:
    with ds_pso.init(config(case, place(case)[2])) as swarm:
        engine, _ = engine_with(case, swarm, other)
        if swarm.is_leader:
            with pytest.warns(UserWarning, match="schedule-free optimizer") as caught:
                swarm.attach(engine)
            assert len([w for w in caught if "schedule-free" in str(w.message)]) == 1
        else:
            swarm.attach(engine)


def test_what_goes_badly_with_it_is_said(pool: Pool) -> None:
    need("schedulefree-adamw")
    pool.run(warned, Case(sync_mode="easgd"), ADAMW)
