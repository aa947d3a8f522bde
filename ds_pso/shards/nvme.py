"""ZeRO 3 with its optimizer on NVMe: masters and moments are files between optimizer steps, and mapped when needed.

DeepSpeed has a file for each of these tensors of a sub-group. For the step of that sub-group it reads them into
buffers, and then it writes them and leaves the tensors empty. A sync point, a checkpoint or an export finds the same
files mapped into memory: it reads and writes tensors as everywhere else, and the kernel reads and writes pages as they
are used, so that no more of them lies in memory than there is room for.

Knows DeepSpeed's swapper; must not know peers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_pso.shards.engine import Engine

_ALIGNED = 128  # fp32 elements, of 512 bytes


class _SwapFile(Protocol):
    """DeepSpeed's ``SwapTensorContext``: a tensor, and the file that has its values."""

    compute_tensor: Tensor
    swap_path: str


class _SwapInfo(Protocol):
    """DeepSpeed's ``OptimizerStateSwapInfo``: the master of a sub-group, and behind it the state that it has."""

    tensors: list[_SwapFile]


class _Swapper(Protocol):
    """The part of DeepSpeed's ``OptimizerSwapper`` that is used here."""

    swap_folder: str
    swap_params_info: dict[str, _SwapInfo]

    def purge_state(self) -> None: ...
    def _get_param_swap_info(self, parameter: Tensor) -> _SwapInfo | None: ...
    def _io_aligned_numel(self, numel: int) -> int: ...


class _Optimizer(Protocol):
    """The part of ``DeepSpeedZeroOptimizer_Stage3`` that is used here."""

    swap_optimizer: bool
    optimizer_swapper: _Swapper
    fp32_partitioned_groups_flat: list[Tensor]
    fp16_partitioned_groups_flat_numel: list[int]

    def _swappable_optimizer_subgroup(self, sub_group_id: int) -> bool: ...


class NvmeOffload:
    """Maps the masters and the optimizer's state that lie on NVMe.

    Sub-groups of less than 1 MiB stay in memory, and so do counts of steps.

    Attributes:
        is_mapped: whether the tensors have their values.
    """

    def __init__(self, optimizer: _Optimizer) -> None:
        self._optimizer = optimizer
        self._writes = False
        self._blocks = 0

    @classmethod
    def of(cls, optimizer: Any) -> NvmeOffload | None:
        """Return that of an optimizer of DeepSpeed's; None: nothing of it lies on NVMe."""
        return cls(optimizer) if getattr(optimizer, "swap_optimizer", False) else None

    @property
    def is_mapped(self) -> bool:
        return self._blocks > 0

    @contextlib.contextmanager
    def mapped(self, *, writes: bool = True) -> Iterator[None]:
        """In the block all tensors have their values. Blocks may be nested.

        Args:
            writes: what is written to the tensors, and state that the optimizer has got or lost, counts.
        """
        if not self.is_mapped:
            for numel, files in self._files():
                for file in files:
                    file.compute_tensor.data = self._map(file.swap_path, numel)
        self._writes |= writes
        self._blocks += 1
        try:
            yield
        finally:
            self._blocks -= 1
            if not self.is_mapped:
                self._unmap()

    def _on_nvme(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the master of each sub-group on NVMe, and its number of elements."""
        optimizer = self._optimizer
        sizes = optimizer.fp16_partitioned_groups_flat_numel
        for number, (master, numel) in enumerate(zip(optimizer.fp32_partitioned_groups_flat, sizes, strict=True)):
            if optimizer._swappable_optimizer_subgroup(number):
                yield master, int(numel)

    def _files(self) -> Iterator[tuple[int, list[_SwapFile]]]:
        """Yield the number of elements of each sub-group, and its files: of the master, and of the state."""
        for master, numel in self._on_nvme():
            yield numel, self._optimizer.optimizer_swapper.swap_params_info[master.ds_id].tensors  # type: ignore[attr-defined]

    def _map(self, path: str, numel: int) -> Tensor:
        """Map a file of the length that DeepSpeed reads at once; without one, of zeros."""
        whole = self._optimizer.optimizer_swapper._io_aligned_numel(numel)
        if not Path(path).exists():
            with Path(path).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * whole)  # a full disk is an error here, and kills in a mapping
        return torch.from_file(path, shared=True, size=whole, dtype=torch.float32)[:numel]

    def _unmap(self) -> None:
        if self._writes:
            self._follow_state()
        for _, files in self._files():
            for file in files:
                file.compute_tensor.data = torch.empty(0)
                if self._writes:
                    with Path(file.swap_path).open("rb") as written:
                        os.fsync(written.fileno())  # DeepSpeed reads past the page cache
        self._writes = False

    def _follow_state(self) -> None:
        """Let DeepSpeed have files of the state that the optimizer has now: it may have been loaded, or reset."""
        swapper = self._optimizer.optimizer_swapper
        mapped = {id(file.compute_tensor) for _, files in self._files() for file in files}
        swapper.purge_state()
        for master, numel in self._on_nvme():
            info = swapper._get_param_swap_info(master)
            for file in [] if info is None else info.tensors:
                if id(file.compute_tensor) not in mapped:
                    values = file.compute_tensor.data
                    file.compute_tensor.data = self._map(file.swap_path, numel).copy_(values)


def has_weights_on_nvme(optimizer: Any) -> bool:
    """Return true if there are sub-groups of working weights for which DeepSpeed has no buffer in memory."""
    return any(part is None for part in getattr(optimizer, "fp16_partitioned_groups_flat", ()))


@contextlib.contextmanager
def working_weights_in_memory(optimizer: Any) -> Iterator[None]:
    """In the block sub-groups of working weights on NVMe have the buffers for which DeepSpeed looks when it loads.

    Args:
        optimizer: of DeepSpeed's, at ZeRO 3. Its masters must have their values at the end of the block.
    """
    optimizer.checkpoint_event_prologue()  # lets go of gathered parameters, as loading does
    flat = optimizer.fp16_partitioned_groups_flat
    swapped = [number for number, part in enumerate(flat) if part is None]
    places = [(tensor, tensor.data) for number in swapped for tensor in optimizer.fp16_partitioned_groups[number]]
    for number in swapped:
        flat[number] = torch.empty(optimizer.fp16_partitioned_groups_flat_numel[number], dtype=optimizer.dtype)
    try:
        yield
    finally:
        for number in swapped:
            flat[number] = None
        for tensor, place in places:
            tensor.data = place
        for number in swapped:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)


def cautions_of_nvme(engine: Engine) -> list[str]:
    """Return what DeepSpeed gets wrong with an optimizer on NVMe, with a remedy."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for number, parameters in enumerate(optimizer.fp16_groups if NvmeOffload.of(optimizer) else ()):
        begin = 0
        for parameter in parameters if optimizer._swappable_optimizer_subgroup(number) else ():
            numel = parameter.partition_numel()
            if begin % _ALIGNED and optimizer.optimizer_swapper.is_swappable_tensor(numel=numel):
                return [
                    f"{names[id(parameter)]} begins at element {begin} of its sub-group, which is no multiple of "
                    f"{_ALIGNED}: where a disk reads into aligned memory alone, DeepSpeed trains it with a wrong "
                    'gradient, and says nothing; compare the first losses with those of "device": "cpu"'
                ]
            begin += numel
    return []


def swap_folders(engine: Engine) -> set[Path]:
    """Return the folders into which this rank swaps, optimizer and parameters."""
    swappers = [getattr(engine.optimizer, "optimizer_swapper", None)]
    swappers += [getattr(parameter, "nvme_swapper", None) for parameter in engine.module.parameters()]
    return {Path(swapper.swap_folder) for swapper in swappers if swapper is not None}
