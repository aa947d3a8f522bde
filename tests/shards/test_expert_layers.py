"""Names of experts: those of the ranks of expert parallelism together are those of a layer that has all of them."""

from __future__ import annotations

import pytest
from deepspeed.utils import groups
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_pso.shards.experts import replicas_of, whole_parameters, why_not_whole


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False))


def model(layers: int, experts: int) -> nn.Module:
    """The parts of ``deepspeed.moe.layer.MoE`` that have parameters, and a layer around them."""
    found = nn.Module()
    found.first = nn.Linear(3, 3)
    found.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.gate, layer.deepspeed_experts = nn.Linear(3, 8), nn.ModuleList(expert() for _ in range(experts))
        for parameter in layer.deepspeed_experts.parameters():
            parameter.allreduce, parameter.group_name = False, "ep"
        found.layers.append(layer)
    found.last = nn.Linear(3, 3)
    return found


class Groups:
    def __init__(self, patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
        patch.setattr(groups, "_get_expert_parallel_rank", lambda name: rank)
        patch.setattr(groups, "_get_expert_parallel_world_size", lambda name: size)
        patch.setattr(groups, "_get_expert_data_parallel_group", lambda name: f"the group of {name}")


@given(layers=st.integers(1, 3), each=st.integers(1, 3), size=st.integers(1, 4))
def test_every_rank_knows_the_whole_model(layers, each, size):
    expected = [(name, p.shape) for name, p in model(layers, each * size).named_parameters()]
    here: dict[str, int] = {}
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch:
            Groups(patch, rank, size)
            mine = model(layers, each)
            found = whole_parameters(mine)
            assert [(p.name, p.like.shape) for p in found] == expected
            assert {id(p.like) for p in found if p.is_here} == {id(p) for p in mine.parameters()}
            for parameter in found:
                here[parameter.name] = here.get(parameter.name, 0) + parameter.is_here
    assert here == {name: 1 if "experts" in name and size > 1 else size for name, _ in expected}


def test_expert_j_of_rank_e_has_deepspeeds_number(monkeypatch):
    Groups(monkeypatch, rank=2, size=4)
    mine = model(1, 3)
    found = {id(p.like): p.name for p in whole_parameters(mine) if p.is_here}
    for local, expert in enumerate(mine.layers[0].deepspeed_experts):
        assert found[id(expert[0].bias)] == f"layers.0.deepspeed_experts.{6 + local}.0.bias"


@pytest.mark.parametrize("size", [1, 2])
def test_only_experts_that_are_spread_have_a_group_of_their_own(monkeypatch, size):
    Groups(monkeypatch, rank=0, size=size)
    mine = model(1, 2)
    assert replicas_of(mine.first.weight) is None
    group = replicas_of(mine.layers[0].deepspeed_experts[0][0].weight)
    assert group == (None if size == 1 else "the group of ep")


@pytest.mark.parametrize(("size", "persistent", "is_refused"), [(2, True, True), (2, False, False), (1, True, False)])
def test_buffers_of_experts_that_are_spread_are_refused(monkeypatch, size, persistent, is_refused):
    Groups(monkeypatch, rank=0, size=size)
    mine = model(1, 2)
    mine.layers[0].deepspeed_experts[1].register_buffer("seen", mine.first.bias.detach(), persistent=persistent)
    reason = why_not_whole(mine, 2)
    assert ("layers.0.deepspeed_experts.1.seen" in (reason or "")) == is_refused


@pytest.mark.parametrize(("size", "stage", "is_refused"), [(2, 2, True), (2, 1, False), (2, 0, False), (1, 2, False)])
def test_experts_that_are_not_trained_are_refused_where_deepspeed_loads_others(monkeypatch, size, stage, is_refused):
    Groups(monkeypatch, rank=0, size=size)
    mine = model(1, 2)
    mine.layers[0].deepspeed_experts[1][1].requires_grad_(False)
    assert ("experts of layers.0.deepspeed_experts are not" in (why_not_whole(mine, stage) or "")) == is_refused
