"""The arithmetic of shards: which elements belong to whom, and which are padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.errors import SwarmError
from ds_pso.shards.base import Segment, Shards, _gaps, intersect
from ds_pso.shards.replicated import _equal_parts

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
    parts = _equal_parts(numels, num_parts)
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

    def __init__(self, module: torch.nn.Module) -> None:
        optimizer = torch.optim.Adam(module.parameters())
        self.flat = torch.full((sum(p.numel() + 2 for p in module.parameters()),), torch.nan)
        super().__init__(type("Engine", (), {"optimizer": optimizer, "module": module})())
        for segment in self.segments:
            self.flat[segment.shard_start : segment.shard_start + segment.numel] = 1.0

    @property
    def tensors(self):
        return [self.flat]

    def _find_segments(self):
        segments, offset = [], 0
        for param in self.module.parameters():
            segments.append(Segment(self.name_of(param), 0, offset, 0, param.numel()))
            offset += param.numel() + 2
        return segments

    def _parameters(self):
        return [list(self.module.parameters())]

    def publish(self):
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
    assert shards.all_finite()
    shards.flat[4] = value
    assert not shards.all_finite()


def test_moments_of_a_mad_particle_are_dropped_and_its_steps_kept():
    shards = OneShard(model())
    for param in shards.module.parameters():
        param.grad = torch.ones_like(param)
    shards.optimizer.step()
    moments = [shards.optimizer.state[p]["exp_avg"] for p in shards.module.parameters()]
    for moment in moments:
        moment.view(-1)[0] = torch.nan
        moment.view(-1)[-1] = torch.inf
    shards.reset_optimizer_state()
    assert not any(moment.any() for moment in moments)
    # A huge first moment over a second one of zero would throw the weights far away.
    before = [param.detach().clone() for param in shards.module.parameters()]
    shards.optimizer.step()
    learning_rate = shards.optimizer.param_groups[0]["lr"]
    for param, old in zip(shards.module.parameters(), before, strict=True):
        assert (param - old).abs().max() < 10 * learning_rate
    assert all(shards.optimizer.state[param]["step"] == 2 for param in shards.module.parameters())


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
