"""Digests of what is not trained: every change is seen, in any dtype, and in turn all of it is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_pso.shards import untrained
from ds_pso.shards.untrained import Frozen, as_bytes, digest, is_averaged, join_digests

DTYPES = [
    *(torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64),
]


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,)], ids=str)
def test_every_byte_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, *shape)
    before = digest(tensor)
    with as_bytes([tensor]) as (flat,):
        for place in range(flat.numel()):
            flat[place] = 1
            assert digest(tensor) != before
            assert 0 < digest(tensor) < 2**52
            flat[place] = 0
    assert digest(tensor) == before


def test_every_bit_of_a_word_counts():
    tensor = torch.zeros(2, dtype=torch.int64)
    seen = {digest(tensor)}
    for bit in range(64):
        tensor[1] = 1 << bit if bit < 63 else -(2**63)
        seen.add(digest(tensor))
    assert len(seen) == 65


def test_bytes_are_written_where_flattening_copies():
    tensor = torch.zeros(2, 3, dtype=torch.int8).t()
    with as_bytes([tensor]) as (flat,):
        flat.copy_(torch.arange(6))
    assert tensor.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_digests_are_joined_in_their_order():
    assert join_digests([]) == 0
    assert join_digests([1.0, 2.0]) != join_digests([2.0, 1.0])
    assert join_digests([1.0, -2.0]) == -join_digests([1.0, 2.0])


class Base(nn.Module):
    """Frozen tensors of unequal sizes, a count, a table and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(3))
        for number, numel in enumerate((5, 100, 1, 40, 40, 700, 2)):
            values = nn.Parameter(torch.zeros(numel, dtype=torch.int8), requires_grad=False)
            self.register_parameter(f"frozen{number}", values)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.zeros(6, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))


def frozen_of(module: Base) -> Frozen:
    found = Frozen(module, ["trained"], lambda: list(module.named_buffers()))
    found.remember()
    return found


def test_what_is_compared():
    """All but what is trained or averaged, and counts; these are copied at attach all the same."""
    found = frozen_of(Base())
    names = {f"frozen{number}" for number in range(7)} | {"table"}
    assert set(found.compared()) == names
    assert set(found.tensors()) == names | {"count"}
    assert [tensor.numel() for tensor in found.counters()] == [1, 6]
    assert not is_averaged(torch.zeros(1, dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("part_bytes", [1, 64, 300, 2**20])
def test_in_turn_all_is_looked_at(monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(untrained, "_PART_BYTES", part_bytes)
    module = Base()
    found = frozen_of(module)
    assert found.digest_of_part(None) > 0
    for name, tensor in found.compared().items():
        tensor.data.view(-1)[0] += 1
        noticed = [found.digest_of_part(number) < 0 for number in range(7, 7 + 16)]
        assert any(noticed), name
        assert all(noticed) == (part_bytes == 2**20)
        assert found.digest_of_part(None) < 0
        assert [value < 0 for value in found.digests()] == [other == name for other in found.compared()]
        tensor.data.view(-1)[0] -= 1
    assert found.digest_of_part(None) > 0


def test_what_is_the_particles_own_is_not_compared():
    module = Base()
    found = frozen_of(module)
    before = found.digest_of_part(None)
    found.own.add("table")
    without = found.digest_of_part(None)
    assert without not in (before, 0)
    module.table[0] = 7
    assert found.digest_of_part(None) == without
    assert found.digests()[list(found.compared()).index("table")] == 0
