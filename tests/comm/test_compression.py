"""The formats that lose digits: how many, and never more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_pso.comm import compression
from ds_pso.comm.compression import (
    BLOCK,
    FORMATS,
    Differences,
    Format,
    FormatEntry,
    bytes_per_element,
    find_format,
    is_partial,
)
from ds_pso.comm.compression.roots import Roots
from ds_pso.config.cost_model import Cluster, sync_cost
from ds_pso.config.load import load_config
from ds_pso.errors import ConfigError

relaxed = settings(deadline=None, max_examples=60)
DENSE = [name for name in FORMATS if not is_partial(name)]  # the others: test_sparse.py
formats = st.sampled_from([find_format(name) for name in DENSE])


def through(form: Format, values: Tensor) -> tuple[Tensor, Tensor]:
    """What arrives, and the bytes."""
    encoded = torch.full((form.nbytes(values.numel()),), 255, dtype=torch.uint8)
    form.encode(values, encoded)
    arrived = torch.full_like(values, float("nan"))
    form.decode(encoded, arrived)
    return arrived, encoded


@st.composite
def numbers(draw: st.DrawFn) -> Tensor:
    """Blocks of very different size."""
    exponents = draw(st.lists(st.integers(-45, 37), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = [rng.normal(size=BLOCK).astype(np.float32) * np.float32(10.0**exponent) for exponent in exponents]
    if draw(st.booleans()):
        blocks.append(np.zeros(BLOCK, np.float32))
    return torch.from_numpy(np.concatenate(blocks))


@relaxed
@given(st.sampled_from([("int8", 127), ("int4", 7)]), numbers())
def test_whole_numbers_err_by_half_a_step_of_their_block(which, values):
    name, levels = which
    arrived, _ = through(find_format(name), values)
    for before, after in zip(values.view(-1, BLOCK).double(), arrived.view(-1, BLOCK).double(), strict=True):
        largest = float(before.abs().max())
        # Scales that fp32 can hardly hold lose their block.
        bound = largest / levels / 2 * (1 + 1e-5) if largest / levels > 1e-37 else largest
        assert float((before - after).abs().max()) <= bound


@relaxed
@given(numbers())
def test_two_bits_are_the_means_of_two_groups(values):
    arrived, _ = through(find_format("int2"), values)
    for before, after in zip(values.view(-1, BLOCK).double(), arrived.view(-1, BLOCK).double(), strict=True):
        size = before.abs()
        border = size.square().mean().sqrt()
        for large in (True, False):
            # What is next to the border may be in either group.
            group = (size > border * (1 + 1e-4)) if large else (size < border * (1 - 1e-4))
            both = (size > border * (1 - 1e-4)) if large else (size < border * (1 + 1e-4))
            if group.sum() == both.sum() > 0 and size[group].mean() > 1e-35:
                expected = size[group].mean().float().bfloat16().double()
                torch.testing.assert_close(after[group].abs(), expected.expand(int(group.sum())), rtol=2**-7, atol=0)
        assert not ((after * before) < 0).any(), "a sign was lost"


@relaxed
@given(numbers())
def test_powers_of_two_are_the_nearest(values):
    arrived, _ = through(find_format("e3m0"), values)
    for before, after in zip(values.view(-1, BLOCK).double(), arrived.view(-1, BLOCK).double(), strict=True):
        largest = float(before.abs().max())
        if largest < 1e-36:
            continue
        levels = torch.tensor([0.0, *(largest / 2**e for e in range(7))], dtype=torch.float64)
        levels = torch.cat([-levels, levels])
        nearest = (before[:, None] - levels).abs().min(1).values
        torch.testing.assert_close((before - after).abs(), nearest, rtol=0, atol=1e-5 * largest)
        assert set(np.round(np.log2(largest / after.abs()[after != 0].numpy()), 5)) <= set(range(7))


@relaxed
@given(numbers())
def test_bf16_is_torchs_own(values):
    arrived, _ = through(find_format("bf16"), values)
    assert torch.equal(arrived, values.bfloat16().float())


@relaxed
@given(formats, numbers())
def test_what_has_been_rounded_is_not_rounded_again(form, values):
    arrived, _ = through(form, values)
    again, _ = through(form, arrived)
    torch.testing.assert_close(again, arrived, rtol=1e-6, atol=0)


@relaxed
@given(st.sampled_from([("bf16", 128), ("int8", 127), ("int4", 7)]), numbers())
def test_roots_are_as_good_as_the_format_inside_and_never_negative(which, values):
    """Of numbers of any sign: those below zero arrive as zero."""
    name, levels = which
    form = Roots(find_format(name))
    arrived, _ = through(form, values)
    assert (arrived >= 0).all()
    roots = values.clamp(min=0).sqrt().double().view(-1, BLOCK)
    for before, after in zip(roots, arrived.double().sqrt().view(-1, BLOCK), strict=True):
        most = float(before.max()) / levels / 2 * (1 + 1e-4)
        assert float((before - after).abs().max()) <= max(most, 1e-22)
    rest = values.clone()
    encoded = torch.empty(form.nbytes(values.numel()), dtype=torch.uint8)
    form.encode_and_subtract(rest, encoded)
    total = rest.clone()
    form.add_decoded(encoded, total)
    torch.testing.assert_close(total, values, rtol=1e-5, atol=float(values.abs().max()) * 1e-6)


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
def test_every_level_of_a_block_arrives(name, levels):
    values = torch.arange(-levels, levels + 1).repeat(BLOCK)[:BLOCK].float() * 0.25
    arrived, _ = through(find_format(name), values)
    assert torch.equal(arrived, values)


@given(formats, numbers(), st.floats(-2, 2, width=32))
@relaxed
def test_what_is_subtracted_and_added_is_what_arrives(form, values, before):
    arrived, encoded = through(form, values)
    left, again = values.clone(), torch.full_like(encoded, 3)
    form.encode_and_subtract(left, again)
    assert torch.equal(again, encoded)
    assert torch.equal(left, values - arrived)
    total = torch.full_like(values, before)
    form.add_decoded(encoded, total)
    assert torch.equal(total, before + arrived)


@pytest.mark.parametrize("name", DENSE)
def test_more_blocks_than_are_worked_on_at_a_time(name):
    form = find_format(name)
    values = torch.randn(3000 * BLOCK, generator=torch.Generator().manual_seed(1))
    arrived, encoded = through(form, values)
    parts = [through(form, block) for block in values.view(-1, BLOCK)]
    assert torch.equal(arrived, torch.cat([part for part, _ in parts]))
    assert encoded.numel() == sum(part.numel() for _, part in parts)


@pytest.mark.parametrize(("name", "times"), [("bf16", 2), ("int8", 3.9), ("int4", 7), ("e3m0", 7), ("int2", 15)])
def test_how_small_it_is(name, times):
    assert times * find_format(name).nbytes(BLOCK) <= 4 * BLOCK


def test_differences_remember_copies():
    start = [torch.ones(3), torch.zeros(0)]
    differences = Differences(find_format("int8"), start)
    start[0].fill_(5)
    assert differences.common[0].tolist() == [1, 1, 1]
    differences.agree_on(start)
    start[0].fill_(6)
    assert differences.common[0].tolist() == [5, 5, 5]
    assert differences.residual[0].tolist() == [0, 0, 0]


# -- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_has_the_size_of_the_format(name):
    form = find_format(name)
    assert form.nbytes(form.block) == form.block * bytes_per_element(name)


def test_every_lazy_name_is_there():
    assert [getattr(compression, name) for name in compression.__all__]
    with pytest.raises(AttributeError, match=r"module 'ds_pso.comm.compression' has no attribute 'BFloat17'"):
        _ = compression.BFloat17


class Halves(Format):
    """IEEE half precision, as an example of a format that a user adds."""

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def _codes(self, blocks: int, encoded: Tensor) -> tuple[Tensor, ...]:
        return (encoded.view(torch.float16).view(blocks, BLOCK),)

    def _write(self, blocks: Tensor, *codes: Tensor) -> None:
        codes[0].copy_(blocks)

    def _read(self, blocks: Tensor, *codes: Tensor) -> None:
        blocks.copy_(codes[0])


HALVES = Halves()


def test_a_format_is_added_by_one_line(monkeypatch):
    monkeypatch.setitem(FORMATS, "fp16", FormatEntry(f"{__name__}:HALVES", 2.0))
    values = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0))
    arrived, _ = through(find_format("fp16"), values)
    assert torch.equal(arrived, values.half().float())
    _, swarm = load_config({"swarm": {"particles": 2, "wire": "fp16"}})
    assert swarm.wire == "fp16"
    cluster = Cluster(1e6, particles=2, ranks=1, step_s=1.0, bandwidth=1e9)
    assert sync_cost(cluster, swarm).megabytes == 2.0
    with pytest.raises(ConfigError, match="must be 'fp32', 'bf16', 'int8', 'int4', 'e3m0', 'int2', 'sparse' or 'fp16'"):
        load_config({"swarm": {"wire": "fp8"}})
