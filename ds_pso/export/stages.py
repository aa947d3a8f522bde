"""Brings the layers of all stages of a pipeline to one rank, under the names that PipelineModule gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ds_pso.distributed.local_group import local_device
from ds_pso.export import contents


def gather_stages(engine: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all stages on the first one; elsewhere those of its own.

    Called on the first data-parallel rank of each stage. Names are ``3.weight`` for a parameter of layer 3, and
    ``tied_modules.embed.weight`` for one that several layers share, which is there once.

    Args:
        tensors: of this rank's stage, by name, on the CPU.
    """
    tied = contents.tied_names(engine.module)
    tensors = tensors | {name: tensors[source].clone() for name, source in tied.items()}
    ranks = [engine.grid.stage_to_global(stage, data=0) for stage in range(engine.num_stages)]
    if not engine.is_first_stage():
        _send(tensors, ranks[0])
        return tensors
    for rank in ranks[1:]:
        tensors = _received(rank) | tensors
    return tensors


def write_stages(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write what ``gather_stages`` returned: into a file for ``load_state_dict`` of a PipelineModule with one stage."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _send(tensors: dict[str, Tensor], rank: int) -> None:
    listed = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
    header = torch.tensor(list(json.dumps(listed).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([header.numel()], device=local_device()), rank)
    for tensor in (header, *tensors.values()):
        dist.send(tensor.contiguous().reshape(-1).view(torch.uint8).to(local_device()), rank)


def _received(rank: int) -> dict[str, Tensor]:
    length = torch.zeros(1, dtype=torch.int64, device=local_device())
    dist.recv(length, rank)
    header = _receive_bytes(int(length), rank)
    tensors = {}
    for name, shape, dtype_name in json.loads(bytes(header.tolist())):
        dtype = getattr(torch, dtype_name)
        flat = _receive_bytes(torch.Size(shape).numel() * dtype.itemsize, rank)
        tensors[name] = flat.view(dtype).view(shape)
    return tensors


def _receive_bytes(count: int, rank: int) -> Tensor:
    received = torch.empty(count, dtype=torch.uint8, device=local_device())
    dist.recv(received, rank)
    return received.cpu()
