"""Expert load: tokens are counted as the model routes them, and distances are those of the equation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from ds_pso.sync.expert_load import ExpertLoad

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(num_local_experts=3, **SIZES),
    "qwen3_moe": Qwen3MoeConfig(num_experts=5, moe_intermediate_size=12, **SIZES),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_counted_where_they_go(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    load = ExpertLoad(model)
    size = {"mixtral": 3, "qwen3_moe": 5}[name]
    assert load.sizes == [size, size]
    assert load.take() == [0.0] * (2 * size)
    expected = torch.zeros(2, size)
    model.train()
    for _ in range(2):
        tokens = torch.randint(0, 37, (2, 7))
        logits = model(input_ids=tokens, output_router_logits=True).router_logits
        for layer in range(2):
            best = logits[layer].topk(2).indices
            expected[layer] += torch.nn.functional.one_hot(best, size).sum((0, 1))
    model.eval()
    model(input_ids=tokens)  # an evaluation does not count
    assert load.take() == expected.view(-1).tolist()
    assert load.take() == [0.0] * (2 * size)


class Router(nn.Module):
    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts


class Model(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.routers = nn.ModuleList(Router(size) for size in sizes)
        self.can_record_outputs = {"router_logits": Router}


counts = st.lists(
    st.lists(st.integers(1, 1000).map(float), min_size=5, max_size=5),
    min_size=1,
    max_size=4,
)


@given(table=counts)
def test_distances_follow_the_equation(table):
    load = ExpertLoad(Model(2, 3))
    found = load.distances(table)
    expected = np.zeros(len(table))
    for columns in (slice(0, 2), slice(2, 5)):
        part = np.array(table)[:, columns]
        shares = part / part.sum(1, keepdims=True)
        expected += np.abs(shares - shares.mean(0)).sum(1) / 4
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert all(0 <= value <= 1 - 1 / len(table) + 1e-12 for value in found)


def test_who_is_absent_or_has_routed_nothing_is_not_compared():
    load = ExpertLoad(Model(2))
    found = load.distances([[3.0, 1.0], [math.nan, math.nan], [1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_array_equal(found, [0.25, math.nan, 0.25, math.nan])
    assert all(math.isnan(value) for value in load.distances([[0.0, 0.0]] * 2))


def test_particles_that_use_different_experts_are_as_far_apart_as_can_be():
    assert ExpertLoad(Model(2)).distances([[4.0, 0.0], [0.0, 9.0]]) == (0.5, 0.5)


def test_a_router_that_does_not_say_what_it_has_chosen_is_passed_over():
    model = Model(2)
    load = ExpertLoad(model)
    model.routers[0].forward = lambda x: (x, x)
    model.routers[0](torch.zeros(2, 2))
    assert load.take() == [0.0, 0.0]
    assert ExpertLoad(nn.Linear(2, 2)).sizes == []
