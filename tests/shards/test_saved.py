"""The saved state of each optimizer class: recognised by its keys, and read by nothing but its own module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ds_pso
from ds_pso.errors import CheckpointError
from ds_pso.shards import SavedPartition, saved_optimizer
from ds_pso.shards.layout import ShardLayout
from ds_pso.shards.registry import LAYOUTS

BASE = {"state": {0: {"exp_avg": torch.zeros(4)}, 1: {}}, "param_groups": [{"params": [0]}, {"params": [1, 2]}]}
X = [torch.arange(5.0), torch.arange(5.0, 8.0)]
STATES = {
    "zero3": {"optimizer_state_dict": BASE, "fp32_flat_groups": X, "loss_scaler": None},
    "zero12": {"base_optimizer_state": BASE, "single_partition_of_fp32_groups": X, "loss_scaler": None},
    "bf16_optimizer": {"base_optimizer_state": BASE, "single_partition_of_fp32_groups": X, "group_paddings": [0, 2]},
    "fp16_flat": {"optimizer_state_dict": BASE, "fp32_groups_flat": X, "clip_grad": 0.0},
    "fp16_split": {"optimizer_state_dict": BASE, "fp32_groups": [X[:1], X[1:]]},
    "fp32": BASE,
}


def module_of(layout: ShardLayout) -> str:
    return layout.shards.__module__.rpartition(".")[2]


def test_there_is_a_state_for_every_optimizer_class():
    assert list(map(module_of, LAYOUTS)) == list(STATES)


@pytest.mark.parametrize("name", STATES)
def test_one_class_and_no_other_recognises_it(name):
    assert [module_of(layout) for layout in LAYOUTS if layout.saved.recognizes(STATES[name])] == [name]


def test_of_an_unknown_class_the_keys_are_named():
    with pytest.raises(CheckpointError, match=r"the keys \['buffers', 'momentum'\]"):
        saved_optimizer({"momentum": 1, "buffers": 2})


@pytest.mark.parametrize("name", STATES)
def test_shards_of_all_ranks_are_the_masters(name):
    """The parameters are the masters where the optimizer has none of its own."""
    state = saved_optimizer(STATES[name])
    if isinstance(state, SavedPartition):
        assert all(a is not b and torch.equal(a, b) for a, b in zip(state.shards(1, 3, []), X, strict=True))
    else:
        shards = [state.shards(rank, 3, X) for rank in range(3)]
        assert torch.equal(torch.cat([part for parts in shards for part in parts]), torch.arange(8.0))
        assert [sum(part.numel() for part in parts) for parts in shards] == [2, 3, 3]


@pytest.mark.parametrize("name", ["zero3", "zero12", "bf16_optimizer"])
def test_groups_and_paddings_of_a_partition(name):
    state = saved_optimizer(dict(STATES[name]))
    assert isinstance(state, SavedPartition)
    assert state.base is BASE
    assert [state.group_of(master) for master in range(3)] == [0, 1, 1]
    assert state.masters_in_group(1) == [1, 2]
    assert [state.padded_numel(shard) for shard in range(2)] == [5, 5 if name == "bf16_optimizer" else 3]
    other = saved_optimizer({**STATES[name], "overflow": True})
    assert isinstance(other, SavedPartition)
    state.copy_common(other)
    state.replace_masters([])
    assert saved_optimizer(state.values).shards(0, 1, []) == []
    assert state.values["overflow"] is True


def test_the_keys_are_known_to_the_module_of_the_class_alone():
    package = Path(ds_pso.__file__).parent
    keys = {key for state in STATES.values() for key in state if key.startswith(("fp32_", "single_", "base_"))}
    for file in package.rglob("*.py"):
        if file.parent.name != "shards":
            assert not [key for key in keys if f'"{key}"' in file.read_text(encoding="utf-8")], file
