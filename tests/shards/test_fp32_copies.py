"""Masters in half precision: what a sync writes is fp32 until it is stored, and gone with the next step."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_pso.shards.base import Segment, Shards
from ds_pso.shards.fp32_copies import HALF

FINE = 1 + 2.0**-12  # neither bf16 nor fp16 has it


class TwoMasters(Shards):
    """One in half precision, and one in fp32, trained by SGD with a rate of 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(2, 1, bias=False))
        self.masters = [torch.ones(3, dtype=dtype, requires_grad=True), torch.ones(2, requires_grad=True)]
        self.optimizer = torch.optim.SGD(self.masters, lr=1.0)
        engine = SimpleNamespace(
            module=self.module, optimizer=self.optimizer, basic_optimizer=self.optimizer, global_steps=0
        )
        super().__init__(engine)  # type: ignore[arg-type]

    def _masters(self) -> Sequence[Tensor]:
        return self.masters

    def _find_segments(self) -> list[Segment]:
        return [Segment(f"{i}.weight", i, 0, 0, master.numel()) for i, master in enumerate(self.masters)]

    def _parameters(self) -> Sequence[Sequence[object]]:
        return [list(self.module.parameters())]

    def _publish_masters(self) -> None:
        pass

    def step(self) -> None:
        for master in self.masters:
            master.grad = torch.ones_like(master)
        self.optimizer.step()


@pytest.fixture(params=HALF)
def shards(request: pytest.FixtureRequest) -> TwoMasters:
    return TwoMasters(request.param)


def test_what_is_written_counts_when_it_is_published(shards: TwoMasters) -> None:
    for tensor in shards.tensors:
        assert tensor.dtype == torch.float32
        tensor.fill_(FINE)
    assert [tensor[0].item() for tensor in shards.tensors] == [FINE, FINE]
    assert shards.masters[0][0].item() == 1.0
    assert shards.masters[1][0].item() == pytest.approx(FINE), "fp32 masters are their own"
    shards.tensors[0].fill_(3 * FINE)
    written = shards.tensors[0]
    shards.publish()
    assert shards.masters[0].tolist() == [3.0] * 3
    assert written.tolist() == [3.0] * 3, "what is read next is what is trained and saved"


def test_a_step_is_seen(shards: TwoMasters) -> None:
    shards.tensors[0].fill_(5.0)
    shards.step()
    assert [tensor.tolist() for tensor in shards.tensors] == [[0.0] * 3, [0.0] * 2]
    shards.publish()
    assert shards.masters[0].tolist() == [0.0] * 3


def test_what_was_loaded_is_seen(shards: TwoMasters) -> None:
    for take_note in (shards.prepare, shards.reloaded):
        before = shards.tensors[0]
        with torch.no_grad():
            shards.masters[0].fill_(shards.masters[0][0].item() + 1)
        take_note()
        assert torch.equal(shards.tensors[0], shards.masters[0].float())
        assert shards.tensors[0] is before, "somebody may hold it, to put it back"


def test_shards_that_are_gone_leave_no_hook_behind() -> None:
    shards = TwoMasters(torch.bfloat16)
    optimizer = shards.optimizer
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del shards
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks


def test_sizes_may_be_asked_for_in_the_middle_of_a_step(shards: TwoMasters) -> None:
    """By the thread of a sync: copies made then would be of masters that have taken half of the step."""

    def ask(*_: object) -> None:
        assert shards.numels == [3, 2]

    shards.optimizer.register_step_pre_hook(ask)
    shards.step()
    assert shards.numels == [3, 2]
    assert [tensor[0].item() for tensor in shards.tensors] == [0.0, 0.0]


def test_fp32_masters_need_no_copies() -> None:
    shards = TwoMasters(torch.float32)
    assert [tensor.data_ptr() for tensor in shards.tensors] == [master.data_ptr() for master in shards.masters]
    assert not shards.optimizer._optimizer_step_pre_hooks
