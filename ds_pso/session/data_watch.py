"""Watches what an engine is trained on: the same samples in two particles, or other batches than a sampler counts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from ds_pso.session.session import Session

_BATCHES = 3  # that are compared: enough to tell data from chance, few enough to cost nothing
_ELEMENTS = 1 << 16  # of each tensor


class DataWatch:
    """A forward hook of one engine, for its training batches alone.

    The first batches are hashed, for the particles to compare at their first sync. Rows are counted while a sampler
    counts batches, so that it can say when the two do not fit.

    Args:
        watched: the module that is given the batches: the engine, or the model of a pipeline engine.
    """

    def __init__(self, session: Session, engine: Any, watched: nn.Module) -> None:
        self._session = session
        self._engine = engine
        self._hash = hashlib.blake2b(digest_size=6)  # 48 bits, which a float64 holds exactly
        self._batches = 0
        watched.register_forward_pre_hook(self._saw, with_kwargs=True)

    def _saw(self, module: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if not (torch.is_grad_enabled() and self._engine.module.training):
            return
        session = self._session
        hashes = session.num_particles > 1 and self._batches < _BATCHES
        if not hashes and not session.samplers:
            return
        tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and _is_plain(leaf)]
        if hashes and tensors:
            self._batches += 1
            for tensor in tensors:
                self._hash.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                self._hash.update(_bytes_of(tensor))
            session.window.samples = float(int.from_bytes(self._hash.digest(), "little") or 1)  # 0: nothing was seen
        rows = next((tensor.shape[0] for tensor in tensors if tensor.dim() > 0), 0)
        for sampler in session.samplers:
            sampler.saw(rows)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


def _bytes_of(tensor: Tensor) -> bytes:
    head = tensor.detach().reshape(-1)[:_ELEMENTS].cpu().contiguous()
    return head.view(torch.uint8).numpy().tobytes() if head.numel() else b""


def shard_training_data(session: Session, engine: Any, make_sampler: Any) -> None:
    """Split the data that ``deepspeed.initialize`` was given over all ranks of the swarm.

    DeepSpeed splits ``training_data`` over the ranks of its own world, which is one particle: so all particles would
    train on the same samples.

    Args:
        make_sampler: ``Swarm.sampler``.
    """
    loader = getattr(engine, "training_dataloader", None)
    loader = getattr(loader, "loader", loader)  # a pipeline engine repeats it
    if loader is None or session.num_particles == 1 or type(loader.data_sampler) is not DistributedSampler:
        return
    given = loader.data_sampler
    loader.data_sampler = make_sampler(
        loader.dataset, batch_size=loader.batch_size, shuffle=given.shuffle, seed=given.seed
    )
    loader.len = len(loader.data_sampler) // loader.batch_size
    if loader.data is not None:  # somebody iterates already, such as DeepSpeed's RepeatingLoader
        loader._create_dataloader()
