"""The arithmetic of shards: which elements belong to whom, and which are padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.errors import SwarmError
from ds_pso.shards.base import Segment, Shards, _gaps, equal_parts, intersect, square_of_norm

relaxed = settings(deadline=None)
sizes = st.lists(st.integers(0, 20), max_size=6)


# -- parameters cut by the windows of ranks -------------------------------------------------


@relaxed
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=6), st.integers(1, 5), st.integers(0, 4))
def test_windows_cut_parameters_without_loss(params, num_ranks, tail):
    """A flat group: parameters of some sizes with padding before each and at the end."""
    begins, offset = [], 0
    for padding, numel in params:
        begins.append(offset + padding)
        offset += padding + numel
    block = -(-(offset + tail) // num_ranks)
    owner_of = {}
    for rank in range(num_ranks):
        window = (rank * block, (rank + 1) * block)
        for index, (begin, (_, numel)) in enumerate(zip(begins, params, strict=True)):
            for segment in intersect(str(index), begin, numel, window, shard=2):
                assert segment.numel > 0
                assert segment.shard == 2
                for i in range(segment.numel):
                    element = (int(segment.name), segment.param_start + i)
                    assert element not in owner_of, "owned twice"
                    owner_of[element] = rank * block + segment.shard_start + i
    expected = {
        (p, i): begin + i for p, (begin, (_, n)) in enumerate(zip(begins, params, strict=True)) for i in range(n)
    }
    assert owner_of == expected


@pytest.mark.parametrize(
    ("begin", "numel", "window", "expected"),
    [
        (0, 10, (0, 10), [(0, 0, 10)]),
        (2, 4, (0, 10), [(2, 0, 4)]),
        (8, 4, (0, 10), [(8, 0, 2)]),
        (8, 4, (10, 20), [(0, 2, 2)]),
        (0, 30, (10, 20), [(0, 10, 10)]),
        (10, 5, (0, 10), []),
        (0, 10, (10, 20), []),
        (3, 0, (0, 10), []),
    ],
)
def test_intersect(begin, numel, window, expected):
    assert intersect("w", begin, numel, window, 0) == [Segment("w", 0, *numbers) for numbers in expected]


# -- padding --------------------------------------------------------------------------------


@st.composite
def shard_contents(draw: st.DrawFn) -> tuple[list[Segment], list[int], list[set[int]]]:
    """Segments, sizes of the shards, and the covered elements of each shard."""
    segments, numels, covered = [], [], []
    for shard, runs in enumerate(
        draw(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=4), max_size=4))
    ):
        offset, taken = 0, set()
        for padding, numel in runs:
            offset += padding
            segments.append(Segment("w", shard, offset, 0, numel))
            taken |= set(range(offset, offset + numel))
            offset += numel
        numels.append(offset + draw(st.integers(0, 3)))
        covered.append(taken)
    return segments, numels, covered


@relaxed
@given(shard_contents())
def test_gaps_are_exactly_what_no_segment_covers(contents):
    segments, numels, covered = contents
    gaps = _gaps(segments, numels)
    assert all(start < stop for _, start, stop in gaps)
    elements = [(shard, i) for shard, start, stop in gaps for i in range(start, stop)]
    assert elements == [(s, i) for s, numel in enumerate(numels) for i in range(numel) if i not in covered[s]]


# -- equal parts ----------------------------------------------------------------------------


@relaxed
@given(sizes, st.integers(1, 7))
def test_equal_parts_tile_in_order_and_are_equal(numels, num_parts):
    parts = equal_parts(numels, num_parts)
    assert len(parts) == num_parts
    runs = [run for part in parts for run in part]
    assert all(start < stop for _, start, stop in runs)
    elements = [(tensor, i) for tensor, start, stop in runs for i in range(start, stop)]
    assert elements == [(tensor, i) for tensor, numel in enumerate(numels) for i in range(numel)]
    lengths = [sum(stop - start for _, start, stop in part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


# -- what every kind of shards does with it -------------------------------------------------


class OneShard(Shards):
    """A module whose parameters lie in one flat tensor, with two elements of padding after each."""

    def __init__(
        self, module: torch.nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.Adam, **options: Any
    ) -> None:
        optimizer = kind(module.parameters(), **options)
        self.flat = torch.full((sum(p.numel() + 2 for p in module.parameters()),), torch.nan)
        engine = {"optimizer": optimizer, "basic_optimizer": optimizer, "module": module, "global_steps": 0}
        super().__init__(type("Engine", (), engine)())
        for segment in self.segments:
            self.flat[segment.shard_start : segment.shard_start + segment.numel] = 1.0

    def _masters(self):
        return [self.flat]

    def _find_segments(self):
        segments, offset = [], 0
        for param in self.module.parameters():
            segments.append(Segment(self.name_of(param), 0, offset, 0, param.numel()))
            offset += param.numel() + 2
        return segments

    def _parameters(self):
        return [list(self.module.parameters())]

    def _publish_masters(self):
        pass


def model(width: int = 3, dtype: torch.dtype = torch.float32, affine: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width, affine=affine)).to(dtype)


def test_padding_is_zeroed_and_nothing_else():
    shards = OneShard(model())
    shards.zero_padding()
    real = torch.zeros_like(shards.flat)
    for segment in shards.segments:
        real[segment.shard_start : segment.shard_start + segment.numel] = 1.0
    assert torch.equal(shards.flat, real)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_weight_is_found(value):
    shards = OneShard(model())
    shards.zero_padding()
    assert math.isfinite(shards.square_norm())
    shards.flat[4] = value
    assert not math.isfinite(shards.square_norm())


@pytest.mark.parametrize("numel", [1, 1000, 2**17 + 3])
@pytest.mark.parametrize("large", [1.0, 1e30], ids=["fits fp32", "does not"])
def test_the_square_of_a_norm(numel, large):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    values[numel // 2] = large
    assert square_of_norm(values) == pytest.approx(np.square(values.numpy().astype(np.float64)).sum(), rel=1e-6)


def take_a_step(shards: OneShard, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for param in shards.module.parameters():
        param.grad = torch.full_like(param, 0.3)
    optimizer.step()
    return [param.detach().clone() for param in shards.module.parameters()]


# -- a learning rate of one's own -----------------------------------------------------------


def test_the_factor_holds_during_a_step_and_is_not_seen_outside():
    shards = OneShard(model(), torch.optim.SGD, lr=0.1)
    seen = []
    shards.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for factor in (1.0, 3.0, 0.5, 1.0):
        before = [param.detach().clone() for param in shards.module.parameters()]
        shards.lr_factor = factor
        assert shards.lr_factor == factor
        shards.optimizer.param_groups[0]["lr"] = 0.2  # as a schedule does between two steps
        for old, new in zip(before, take_a_step(shards, shards.optimizer), strict=True):
            torch.testing.assert_close(new, old - 0.2 * factor * 0.3)
        assert shards.optimizer.param_groups[0]["lr"] == 0.2


def test_weights_and_buffers_are_looked_at_apart():
    """What is not finite at attach is so by design, and a large constant is no weight."""
    module = model()
    module.register_buffer("mask", torch.triu(torch.full((3, 3), -torch.inf), 1))
    module.register_buffer("big", torch.full((4,), 1e9))
    shards = OneShard(module)
    shards.zero_padding()
    health = shards.health(None)
    assert health.square_norm == shards.square_norm() == pytest.approx(float(shards.flat.square().sum()))
    assert health.buffers_square_norm == pytest.approx(4e18)
    assert health.odd_buffer_values == 0
    module[1].running_mean[:2] = torch.tensor([torch.nan, torch.inf])
    assert shards.health(None).odd_buffer_values == 2
    assert shards.health(None).square_norm == health.square_norm
    shards.remember_start()
    assert shards.health(None).odd_buffer_values == 0


def test_buffers_are_the_persistent_floating_ones():
    module = model()
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    module.register_buffer("scale", torch.zeros(2))
    names = [name for name, _ in OneShard(module).buffers()]
    assert names == ["scale", "1.running_mean", "1.running_var"]  # num_batches_tracked is an integer


@pytest.mark.parametrize(
    "other", [{"width": 4}, {"dtype": torch.float64}, {"affine": False}], ids=["shape", "dtype", "names"]
)
def test_the_fingerprint_tells_models_apart(other):
    assert OneShard(model()).fingerprint() == OneShard(model()).fingerprint()
    assert OneShard(model()).fingerprint() != OneShard(model(**other)).fingerprint()


def test_trained_names_are_the_modules():
    shards = OneShard(model())
    assert shards.trained_names() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_parameter_of_another_model_is_refused():
    with pytest.raises(SwarmError, match="not in engine"):
        OneShard(model()).name_of(torch.nn.Parameter(torch.zeros(1)))
