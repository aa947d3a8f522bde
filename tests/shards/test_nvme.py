"""The tensors that DeepSpeed swaps are its files, in a block, and afterwards the files are what was written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_pso.shards.fp32_copies import Fp32Copies
from ds_pso.shards.nvme import NvmeOffload, cautions_of_nvme
from ds_pso.shards.zero3 import Zero3Shards

NUMEL, ALIGNED = 1000, 1024


class File:
    def __init__(self, tensor: Tensor, path: Path) -> None:
        self.compute_tensor, self.swap_path = tensor, str(path)


class Swapper:
    """As DeepSpeed's: a file of aligned length for each tensor, and an empty tensor in between."""

    def __init__(self, folder: Path, state: dict[Tensor, dict[str, Any]]) -> None:
        self.folder, self.state = folder, state
        self.swap_params_info: dict[str, Any] = {}

    def add(self, master: Tensor, values: Tensor) -> None:
        self.swap_params_info[master.ds_id] = SimpleNamespace(tensors=[self.file(master)])
        self.write(master, values)

    def file(self, tensor: Any) -> File:
        return File(tensor, self.folder / f"{tensor.ds_id}.tensor.swp")

    def write(self, tensor: Any, values: Tensor) -> None:
        whole = torch.full((ALIGNED,), 7.0)
        whole[:NUMEL] = values
        Path(self.file(tensor).swap_path).write_bytes(whole.numpy().tobytes())
        tensor.data = torch.empty(0)

    def read(self, ds_id: str) -> Tensor:
        found = torch.frombuffer(bytearray((self.folder / f"{ds_id}.tensor.swp").read_bytes()), dtype=torch.float32)
        assert found.numel() == ALIGNED
        return found[:NUMEL]

    def purge_state(self) -> None:
        for info in self.swap_params_info.values():
            info.tensors = info.tensors[:1]

    def _get_param_swap_info(self, master: Any) -> Any:
        info = self.swap_params_info[master.ds_id]
        if len(info.tensors) == 1:
            for name, value in self.state.get(master, {}).items():
                if isinstance(value, Tensor) and value.numel() >= NUMEL:
                    value.ds_id = f"{name}-{master.ds_id}"
                    info.tensors.append(self.file(value))
        return info

    def _io_aligned_numel(self, numel: int) -> int:
        return -(-numel // ALIGNED) * ALIGNED


class Optimizer:
    """Two sub-groups, of which the second is small and stays in memory."""

    def __init__(self, folder: Path) -> None:
        self.swap_optimizer = True
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.optimizer_swapper = Swapper(folder, self.state)
        self.fp32_partitioned_groups_flat = [torch.empty(0), torch.full((10,), 3.0)]
        self.fp16_partitioned_groups_flat_numel = [NUMEL, 10]
        self.master: Any = self.fp32_partitioned_groups_flat[0]
        self.master.ds_id = "0_1"
        self.optimizer_swapper.add(self.master, torch.arange(NUMEL, dtype=torch.float32))

    def _swappable_optimizer_subgroup(self, number: int) -> bool:
        return number == 0

    def take_a_step(self) -> None:
        moment = self.state.setdefault(self.master, {"step": torch.zeros(()), "exp_avg": torch.empty(0)})["exp_avg"]
        moment.data = torch.ones(NUMEL)
        self.optimizer_swapper._get_param_swap_info(self.master)
        self.optimizer_swapper.write(moment, torch.ones(NUMEL))


@pytest.fixture
def optimizer(tmp_path: Path) -> Optimizer:
    return Optimizer(tmp_path)


def test_what_is_written_in_a_block_is_in_the_files(optimizer: Optimizer) -> None:
    optimizer.take_a_step()
    offload = NvmeOffload.of(optimizer)
    assert offload is not None
    small = optimizer.fp32_partitioned_groups_flat[1]
    with offload.mapped():
        assert offload.is_mapped
        assert torch.equal(optimizer.master, torch.arange(NUMEL, dtype=torch.float32))
        moment = optimizer.state[optimizer.master]["exp_avg"]
        assert torch.equal(moment, torch.ones(NUMEL))
        optimizer.master.mul_(2)
        moment.add_(4)
        small.add_(1)
    assert not offload.is_mapped
    assert optimizer.master.numel() == moment.numel() == 0
    assert torch.equal(optimizer.optimizer_swapper.read("0_1"), 2 * torch.arange(NUMEL, dtype=torch.float32))
    assert torch.equal(optimizer.optimizer_swapper.read("exp_avg-0_1"), torch.full((NUMEL,), 5.0))
    assert torch.equal(small, torch.full((10,), 4.0))


def test_blocks_may_be_nested(optimizer: Optimizer) -> None:
    offload = NvmeOffload(optimizer)
    with offload.mapped():
        with offload.mapped(writes=False):
            optimizer.master.fill_(1)
        assert optimizer.master.numel() == NUMEL
        optimizer.master.add_(1)
    assert torch.equal(optimizer.optimizer_swapper.read("0_1"), torch.full((NUMEL,), 2.0))


def test_files_are_unmapped_where_a_block_fails(optimizer: Optimizer) -> None:
    offload = NvmeOffload(optimizer)
    with pytest.raises(RuntimeError, match="lost"), offload.mapped():
        raise RuntimeError("a peer was lost")
    assert not offload.is_mapped
    assert optimizer.master.numel() == 0


def test_state_that_was_loaded_gets_files(optimizer: Optimizer) -> None:
    """In a process that has not taken a step there are none yet."""
    with NvmeOffload(optimizer).mapped():
        loaded = torch.arange(NUMEL, dtype=torch.float32) / 4
        optimizer.state[optimizer.master] = {"step": torch.tensor(5.0), "exp_avg": loaded.clone()}
    assert torch.equal(optimizer.optimizer_swapper.read("exp_avg-0_1"), loaded)
    files = optimizer.optimizer_swapper.swap_params_info["0_1"].tensors
    assert [Path(file.swap_path).name for file in files] == ["0_1.tensor.swp", "exp_avg-0_1.tensor.swp"]
    assert optimizer.state[optimizer.master]["exp_avg"].numel() == 0
    assert optimizer.state[optimizer.master]["step"] == 5


def test_state_that_replaces_other_state_is_written_over_it(optimizer: Optimizer) -> None:
    optimizer.take_a_step()
    with NvmeOffload(optimizer).mapped():
        optimizer.state[optimizer.master] = {"step": torch.tensor(5.0), "exp_avg": torch.full((NUMEL,), 9.0)}
    assert torch.equal(optimizer.optimizer_swapper.read("exp_avg-0_1"), torch.full((NUMEL,), 9.0))
    with NvmeOffload(optimizer).mapped():
        assert torch.equal(optimizer.state[optimizer.master]["exp_avg"], torch.full((NUMEL,), 9.0))


def test_state_that_was_reset_is_not_read_again(optimizer: Optimizer) -> None:
    optimizer.take_a_step()
    with NvmeOffload(optimizer).mapped():
        optimizer.state.clear()
    assert len(optimizer.optimizer_swapper.swap_params_info["0_1"].tensors) == 1


def test_a_load_is_noticed_outside_of_a_block(optimizer: Optimizer) -> None:
    shards: Any = object.__new__(Zero3Shards)
    shards.optimizer, shards._nvme, shards._copies = optimizer, NvmeOffload(optimizer), Fp32Copies()
    shards.reloaded()
    assert not shards._nvme.is_mapped


def test_an_optimizer_in_memory_has_none() -> None:
    assert NvmeOffload.of(SimpleNamespace(swap_optimizer=False)) is None
    assert NvmeOffload.of(torch.optim.SGD([torch.zeros(1)], lr=0.1)) is None


class Parameter:
    def __init__(self, numel: int) -> None:
        self.numel = numel

    def partition_numel(self) -> int:
        return self.numel


@pytest.mark.parametrize(
    ("numels", "warns"), [([128, 2**18], False), ([2**18, 5, 7], False), ([5, 2**18], True), ([5, 2**17], False)]
)
@pytest.mark.parametrize("swaps", [True, False])
def test_a_gradient_that_deepspeed_may_lose(numels: list[int], warns: bool, swaps: bool) -> None:
    parameters = [Parameter(numel) for numel in numels]
    optimizer = SimpleNamespace(
        swap_optimizer=swaps,
        fp16_groups=[[Parameter(5), Parameter(2**18)], parameters],
        optimizer_swapper=SimpleNamespace(is_swappable_tensor=lambda numel: numel >= 2**18),
        _swappable_optimizer_subgroup=lambda number: number == 1,
    )
    named = [(f"p{number}", parameter) for number, parameter in enumerate(parameters)]
    engine: Any = SimpleNamespace(optimizer=optimizer, module=SimpleNamespace(named_parameters=lambda: named))
    found = cautions_of_nvme(engine)
    assert len(found) == (warns and swaps)
    for text in found:
        assert "p1 begins at element 5 of its sub-group" in text
