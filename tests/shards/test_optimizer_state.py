"""An optimizer that begins anew is a new one, whatever it keeps; and which of that has a mean."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from torch import Tensor, nn

from ds_pso.shards.fp32_copies import Fp32Copies
from ds_pso.shards.optimizer_state import OptimizerState
from ds_pso.shards.zero3 import Zero3Shards

Optimizer = torch.optim.Optimizer


class ScheduleFree(Optimizer):
    """Keeps a copy of the weights, made in its first step, and counts in its groups, as schedulefree does."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9, weight_lr_power: float = 2.0) -> None:
        own = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": True}
        super().__init__(params, {"lr": lr, "beta": beta, "weight_lr_power": weight_lr_power, **own})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"])
            weight = (group["k"] + 1) * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, share).sub_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1

    def eval(self) -> None:
        self._turn(False, lambda beta: 1 - 1 / beta)

    def train(self) -> None:
        self._turn(True, lambda beta: 1 - beta)

    @torch.no_grad()
    def _turn(self, mode: bool, share: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["train_mode"] != mode and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], share(group["beta"]))
            group["train_mode"] = mode


class Eager(Optimizer):
    """Makes all of its state when it is made: a constant, a copy of the weights, a table, and a number."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                table = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
                self.state[p] = {"slow": p.detach().clone(), "scale": torch.full_like(p, 0.5), "table": table, "n": 1}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, state in self.state.items():
            state["n"] += 1
            state["scale"].mul_(0.9)
            state["table"].add_(p.grad)
            state["slow"].lerp_(p, 0.5)
            p.add_(state["slow"] * state["scale"] * state["table"] / state["n"], alpha=-self.param_groups[0]["lr"])


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05, "t0": 1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "SparseAdam": (torch.optim.SparseAdam, {}),
    "ScheduleFree": (ScheduleFree, {}),
    "Eager": (Eager, {}),
}
DENSE = {name: value for name, value in OPTIMIZERS.items() if name != "SparseAdam"}


def test_every_optimizer_of_torch_is_here():
    """But for LBFGS, whose step needs a closure, and Muon, which takes matrices: DeepSpeed trains with neither."""
    known = {name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)}
    assert known - {"Optimizer", "LBFGS", "Muon"} == {
        name for name, (k, _) in OPTIMIZERS.items() if k.__module__[:5] == "torch"
    }


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(7, generator=generator)), nn.Parameter(torch.randn(3, 2, generator=generator))]


def take_steps(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", DENSE)
def test_it_goes_on_as_a_new_one(name: str) -> None:
    kind, options = DENSE[name]
    params = weights()
    optimizer = kind(params, **options)
    state = OptimizerState(optimizer)
    take_steps(optimizer, params, range(4))
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, Tensor) and value.dim():
                value.view(-1)[0] = torch.nan  # as in a particle that is restarted
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn(p.shape))
    state.reset()
    others = copy.deepcopy(params)
    new = kind(others, **options)
    for _ in range(2):  # the second step shows what the first has left
        take_steps(optimizer, params, range(4, 5))
        take_steps(new, others, range(4, 5))
        for mine, expected in zip(params, others, strict=True):
            assert torch.isfinite(mine).all()
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    options_of = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, new)]
    assert options_of[0] == options_of[1]


def test_what_a_schedule_has_set_stays():
    params = weights()
    optimizer = ScheduleFree(params)
    state = OptimizerState(optimizer)
    take_steps(optimizer, params, range(2))
    optimizer.param_groups[0].update(lr=0.5, train_mode=False, mine="mine")
    state.reset()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["train_mode"], group["mine"], group["k"]) == (0.5, False, "mine", 0)


@pytest.mark.parametrize("at_first", [None, 0])
def test_a_count_in_the_groups_begins_anew(at_first: int | None) -> None:
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    if at_first is not None:
        optimizer.param_groups[0]["step"] = at_first
    state = OptimizerState(optimizer)
    optimizer.param_groups[0]["step"] = 7
    state.reset()
    assert optimizer.param_groups[0].get("step") == at_first


def test_tensors_that_were_there_at_first_stay_the_same():
    """DeepSpeed may have references to them."""
    params = weights()
    optimizer = Eager(params)
    state = OptimizerState(optimizer)
    before = {name: value for name, value in optimizer.state[params[0]].items() if isinstance(value, Tensor)}
    take_steps(optimizer, params, range(1))
    state.reset()
    assert all(optimizer.state[params[0]][name] is value for name, value in before.items())


def test_a_step_without_gradients_is_none():
    """DeepSpeed's wrappers for half precision take one when they are made."""
    params = weights()
    optimizer = torch.optim.Adam(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = OptimizerState(optimizer)
    take_steps(optimizer, params, range(2))
    state.reset()
    assert not optimizer.state


def test_what_training_has_left_is_not_how_it_began():
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    take_steps(optimizer, params, range(2))
    OptimizerState(optimizer, has_stepped=True).reset()
    assert not optimizer.state


WITHOUT_MEAN = {
    "Rprop": {"prev", "step_size"},
    "ASGD": {"ax"},
    "Adafactor": {"row_var", "col_var"},  # of the matrix
    "Eager": {"slow", "scale", "table"},
}


@pytest.mark.parametrize("name", DENSE)
def test_what_has_a_mean(name: str) -> None:
    kind, options = DENSE[name]
    params = weights()
    optimizer = kind(params, **options)
    state = OptimizerState(optimizer)
    take_steps(optimizer, params, range(2))
    assert set(state.without_mean()) == WITHOUT_MEAN.get(name, set())
    names = [n for n, value in optimizer.state[params[0]].items() if isinstance(value, Tensor) and value.dim()]
    moments = [n for n in sorted(names) if n not in WITHOUT_MEAN.get(name, ())]
    assert list(state.moments_of(params[0])) == moments
    for key, found in state.moments_of(params[0]).items():
        assert found.data_ptr() == optimizer.state[params[0]][key].data_ptr()


def test_a_copy_of_weights_is_averaged_with_these_alone():
    """Where they are an average of it, and not where it is called the same."""
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    optimizer.state[params[0]] = {"z": torch.zeros(7)}
    assert set(OptimizerState(optimizer).without_mean()) == {"z"}


def test_what_is_evaluated_of_a_schedule_free_optimizer():
    params = weights()
    optimizer = ScheduleFree(params)
    state = OptimizerState(optimizer)
    assert state.is_schedule_free
    with state.evaluating(params):  # there is no state yet
        assert not state.is_in_eval_mode
    take_steps(optimizer, params, range(3))
    before = copy.deepcopy(params)
    expected = [p.lerp(optimizer.state[p]["z"], 1 - 1 / 0.9) for p in params]
    with state.evaluating(params):
        assert state.is_in_eval_mode
        for p, x in zip(params, expected, strict=True):
            assert torch.equal(p, x)
            assert not torch.equal(p, before[0] if p.dim() == 1 else before[1])
        with state.evaluating(params):
            assert torch.equal(params[0], expected[0])
    assert not state.is_in_eval_mode
    for p, values in zip(params, before, strict=True):
        assert torch.equal(p, values)
    assert optimizer.param_groups[0]["train_mode"] is True


def test_others_evaluate_what_they_train():
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    state = OptimizerState(optimizer)
    take_steps(optimizer, params, range(2))
    before = params[0].clone()
    assert not state.is_schedule_free
    with state.evaluating(params):
        assert torch.equal(params[0], before)


class Packed(Tensor):
    """As of an 8-bit optimizer whose state says that it is of floating point, and of the shape of the weights."""


def test_packed_state_has_no_mean():
    """As of 8-bit optimizers, and of LBFGS."""
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    packed = torch.zeros(7).as_subclass(Packed)
    kept = {"state1": torch.zeros(7, dtype=torch.uint8), "old_dirs": [torch.zeros(7)], "exp_avg": packed, "step": 3}
    optimizer.state[params[0]] = kept
    assert set(OptimizerState(optimizer).without_mean()) == {"state1", "old_dirs", "exp_avg"}
    assert OptimizerState(optimizer).moments_of(params[0]) == {}


@pytest.mark.parametrize(
    "kind", [DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion, FusedAdam, FusedLion, FusedLamb]
)
def test_deepspeeds_own_make_their_state_when_it_is_missing(kind: type) -> None:
    """Their kernels are compiled, so their step is not taken here: what they need is that no state is left."""
    import inspect

    assert "len(state) == 0" in inspect.getsource(kind.step)
    params = weights()
    made = {"step": 4, "exp_avg": torch.ones(7), "exp_avg_sq": torch.ones(7)}
    optimizer = SimpleNamespace(state={}, param_groups=[{"params": params, "lr": 0.1}], defaults={})
    state = OptimizerState(optimizer)
    optimizer.state[params[0]] = made
    state.reset()
    assert not optimizer.state


class MuonAtStage3(Zero3Shards):
    """A DeepSpeed optimizer that keeps Muon's momentum beside its state, too."""

    def __init__(self) -> None:
        self.flat = torch.ones(6)
        self.momentum = torch.zeros(6)
        self.optimizer = SimpleNamespace(
            fp32_partitioned_groups_flat=[self.flat],
            muon_momentum_buffer_partitioned_groups_flat={0: self.momentum},
            state={self.flat: {"momentum_buffer": self.momentum}},
            param_groups=[{"params": [self.flat], "lr": 0.1}],
            defaults={},
        )
        self._states, self._nvme = [OptimizerState(self.optimizer)], None
        self._copies = Fp32Copies()


def test_the_momentum_of_muon_at_stage_3():
    shards = MuonAtStage3()
    shards.momentum.fill_(3.0)
    assert torch.equal(shards.moments()[0], shards.momentum)
    assert shards.why_no_mean() is None
    # As after loading: the state is a copy, and DeepSpeed goes on with its own.
    shards.optimizer.state[shards.flat] = {"momentum_buffer": torch.full((6,), 5.0)}
    shards.reloaded()
    assert shards.momentum.tolist() == [5.0] * 6
    assert shards.moments()[0].data_ptr() == shards.momentum.data_ptr()
    shards.optimizer.state[shards.flat] = {"momentum_buffer": torch.full((6,), 7.0)}
    shards.reset_optimizer_state()
    assert shards.momentum.tolist() == [0.0] * 6
    assert shards.moments()[0].tolist() == [0.0] * 6


def test_entries_that_a_mode_has_left_are_dropped():
    """A schedule-free optimizer makes them for parameters that DeepSpeed then replaces, and cannot save."""
    params = weights()
    optimizer = ScheduleFree(params)
    optimizer.param_groups[0]["train_mode"] = False
    optimizer.train()
    masters = copy.deepcopy(params)
    assert params[0] in optimizer.state
    optimizer.param_groups[0]["params"] = masters
    OptimizerState(optimizer)
    take_steps(optimizer, masters, range(1))
    assert len(optimizer.state_dict()["state"]) == 2
