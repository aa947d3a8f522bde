"""Names of a wrapped model are those of the model inside, whatever wraps which part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ds_pso.utils.wrappers import has_wrappers, plain_name, taken_off, unwrapped, without_wrapper_parts


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def model() -> nn.Module:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    return nn.ModuleDict({"module": nn.Linear(3, 3), "blocks": blocks})


def in_parts(whole: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The first block, and in it a layer; and the layer that is called as DataParallel calls what it wraps."""
    whole["blocks"][0][1] = wrap(whole["blocks"][0][1])
    whole["blocks"][0] = wrap(whole["blocks"][0])
    whole["module"] = wrap(whole["module"])
    return whole


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "not at all": lambda whole: whole,
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "all three": lambda whole: nn.DataParallel(compiled(checkpoint_wrapper(whole))),
    "compiled layers": lambda whole: in_parts(whole, compiled),
    "checkpointed layers": lambda whole: in_parts(whole, checkpoint_wrapper),
    "compiled layers in compiled": lambda whole: compiled(in_parts(whole, compiled)),
    "data parallel layers": lambda whole: in_parts(whole, nn.DataParallel),
    "compiled in place": lambda whole: whole.compile(backend="eager") or whole,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_are_those_inside(name: str) -> None:
    inside = model()
    parameters, buffers = dict(inside.named_parameters()), dict(inside.named_buffers())
    outside = WRAPPED[name](inside)
    found = {plain_name(outside, name): value for name, value in outside.named_parameters()}
    assert list(found) == list(parameters)
    assert all(found[name] is value for name, value in parameters.items())
    assert [plain_name(outside, name) for name, _ in outside.named_buffers()] == list(buffers)
    assert has_wrappers(outside) == (list(dict(outside.named_modules())) != list(dict(model().named_modules())))
    assert unwrapped(outside) is inside


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off_and_put_back(name: str) -> None:
    outside = WRAPPED[name](model())
    before = dict(outside.named_modules())
    with contextlib.suppress(OSError), taken_off(outside) as plain:
        assert list(dict(plain.named_modules())) == list(dict(model().named_modules()))
        assert plain.state_dict().keys() == model().state_dict().keys()
        raise OSError
    after = dict(outside.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())


def test_a_name_alone_keeps_what_may_be_the_users() -> None:
    name = "_orig_mod.module.layers.0._checkpoint_wrapped_module._orig_mod.weight"
    assert without_wrapper_parts(name) == "module.layers.0.weight"
