"""Averages the optimizer's moments over the particles: each kind in a period of its own, through a wire of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_pso.comm.compression import Differences, find_format
from ds_pso.comm.compression.roots import Roots
from ds_pso.comm.exchange import Exchange, fill
from ds_pso.distributed.local_group import LocalGroup
from ds_pso.errors import SwarmError
from ds_pso.shards import Shards
from ds_pso.shards.optimizer_state import MOMENTS_OF_KIND
from ds_pso.sync.moment_options import ALL_AT_EACH_SYNC, KINDS, Kind, MomentOptions
from ds_pso.utils.chunks import in_chunks
from ds_pso.utils.offload import Offload

_NO_MEAN, _NO_PERIOD = -1.0, -2.0  # instead of a number of moments
_ROUNDING = 1.05  # how far a first moment may be above what Adam makes, for moments in bf16


@dataclass(frozen=True)
class Moment:
    """A moment of one of this rank's masters; ``tensor`` is flat: live, or a copy."""

    kind: Kind
    master: int
    name: str
    tensor: Tensor

    def copied(self) -> Moment:
        return replace(self, tensor=self.tensor.clone())


class Moments:
    """The moments of this rank's masters, and what their wire keeps.

    With weights w_i, first moments m and second moments v, each at the sync points that its period names:

        m <- sum w_i m_i        v <- sum w_i v_i

    Where they are rounded, or averaged at different sync points, two things that hold of exact means are seen to. A
    mean of what is not negative is at least each one's own share: v >= w_i v_i. And Adam, with beta_1^2 < beta_2, never
    makes a first moment that is large beside the root of the second one, nor do means of both at once:

        |m| <= C sqrt(v),        C = (1 - beta_1) / sqrt((1 - beta_2) (1 - beta_1^2 / beta_2))

    Otherwise an element that others have trained, and this particle has not, would be divided by nearly zero.

    Source: periods of their own, DES-LOC, A. Iacob et al., arXiv 2505.22549; the two bounds are ours, the second one
    from the Cauchy-Schwarz inequality.

    Args:
        delays: whether sync points are applied later.
        offload: where residuals lie, and in how many bits.
    """

    def __init__(
        self,
        exchange: Exchange,
        local: LocalGroup,
        shards: Shards,
        options: MomentOptions,
        *,
        delays: bool = False,
        offload: Offload,
    ) -> None:
        self._exchange, self._local, self._shards = exchange, local, shards
        self._options, self._offload = options, offload
        # Whatever has a mean may travel then: it is averaged with all that it must fit to.
        self._takes_all = options == ALL_AT_EACH_SYNC and not delays
        self._differences: dict[Kind, Differences] = {}

    def due(self, index: int) -> tuple[Kind, ...]:
        """Return what is averaged at the sync point before which there were ``index`` others."""
        return self._options.due(index)

    # -- agreement ----------------------------------------------------------------------------

    def count(self) -> float:
        """Return how many moments this rank has, to be compared with others'; negative: why none can be averaged."""
        if self._shards.why_no_mean() is not None:
            return _NO_MEAN
        return float(len(self._shards.moments())) if self._misfit() is None else _NO_PERIOD

    def _misfit(self) -> str | None:
        """Return the name of a moment that may only be averaged with all others; None: there is none."""
        if self._takes_all:
            return None
        allowed = MOMENTS_OF_KIND["first"] | MOMENTS_OF_KIND["second"]
        return next((name for named in self._shards.named_moments() for name in named if name not in allowed), None)

    def check(self, found: float) -> None:
        """Raise SwarmError if the least of some ``count`` is negative; on all who have compared them."""
        if found == _NO_PERIOD:
            name = self._misfit()
            raise SwarmError(
                f"swarm.moments: the optimizer keeps {'a moment' if name is None else repr(name)} that must fit to the "
                "rest of its state, at each sync point and to the last bit; remove swarm.moments and swarm.delay, or "
                'set swarm.optimizer_state to "keep"',
                agreed=True,
            )
        if found == _NO_MEAN:
            reason = self._shards.why_no_mean() or "the optimizer keeps what has no mean"
            raise SwarmError(
                f'swarm.optimizer_state = "average": {reason}; use "keep" or "reset"',
                agreed=True,
            )

    def agree_with_peers(self, count: float) -> float:
        """Compare with peers: 1: they have as many moments, 0: some have others, or none yet, negative: see ``count``.

        Called alike on all peers.
        """
        rows = self._exchange.all_gather([count])
        counts = [rows[particle][0] for particle in self._exchange.present]
        return min(counts) if min(counts) < 0 else float(len(set(counts)) == 1)

    def agree(self) -> bool:
        """Return whether all particles have moments to average: one whose every step was skipped has none yet.

        Called alike on all ranks.

        Raises:
            SwarmError: they cannot be averaged in this way.
        """
        alike = self.agree_with_peers(self.count())  # of peers, not of local ranks, who may have other numbers of them
        found = [row[0] for row in self._local.gather([alike])]
        self.check(min(found))
        return all(found)

    # -- the mean -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have residuals from now on, where moments are rounded: before what an attempt may change is remembered."""
        if self._options.rounds:
            for kind in KINDS:
                self._wire_of(kind, [moment.tensor for moment in self.of([kind])])

    def of(self, kinds: Sequence[Kind]) -> list[Moment]:
        """Return the moments of these kinds, live, kind by kind."""
        found = [
            Moment("second" if name in MOMENTS_OF_KIND["second"] else "first", master, name, tensor)
            for master, named in enumerate(self._shards.named_moments())
            for name, tensor in named.items()
        ]
        return [moment for kind in kinds for moment in found if moment.kind == kind]

    def average(self, kinds: Sequence[Kind], weights: Sequence[float]) -> None:
        """Let the moments become their mean. Called alike on all peers; ``publish_moments`` is to follow."""
        self.mean_of(self.of(kinds), weights)
        self.bound()

    def mean_of(self, moments: Sequence[Moment], weights: Sequence[float]) -> None:
        """Let moments, or copies, become their weighted mean over the particles, in place."""
        if not self._options.rounds:
            tensors = [moment.tensor for moment in moments]
            fill(tensors, self._exchange.weighted_mean(tensors, weights))
            return
        for kind in KINDS:
            self._mean_of_rounded(kind, [moment for moment in moments if moment.kind == kind], weights)

    def _mean_of_rounded(self, kind: Kind, moments: Sequence[Moment], weights: Sequence[float]) -> None:
        self._zero_padding(moments)
        tensors = [moment.tensor for moment in moments]
        if not tensors:
            return
        wire, share = self._wire_of(kind, tensors), weights[self._exchange.particle]
        for piece, received in self._exchange.mean_by_differences(tensors, weights, wire, feedback=True):
            for mean, own in in_chunks(received, piece.of(tensors[piece.tensor])):
                if kind == "second" and share != 0:
                    torch.maximum(mean, own.to(mean) * share, out=mean)
                own.copy_(mean)

    def _wire_of(self, kind: Kind, tensors: Sequence[Tensor]) -> Differences:
        """Return what the wire keeps of a kind: made when there are moments, and anew if their sizes have changed."""
        found = self._differences.get(kind)
        if found is None or [t.numel() for t in found.residual] != [t.numel() for t in tensors]:
            form = find_format(self._options.wire)
            form = Roots(form) if kind == "second" else form
            found = self._differences[kind] = Differences.to_zero(form, tensors, self._offload)
        return found

    def _zero_padding(self, moments: Sequence[Moment]) -> None:
        """Set alignment padding to zero: whatever lies there would count in the scale of a block."""
        numels = self._shards.numels if self._shards.padding else []
        for shard, start, stop in self._shards.padding:
            for moment in moments:
                if moment.master == shard and moment.tensor.numel() == numels[shard]:
                    moment.tensor[start:stop].zero_()

    def bound(self) -> None:
        """See to it that no first moment is larger beside the root of the second one than Adam would make it."""
        if self._options.keeps_whole:
            return
        for named, decays in zip(self._shards.named_moments(), self._shards.moment_decays(), strict=True):
            limit = _ROUNDING * largest_ratio(decays.get("exp_avg", 1.0), decays.get("exp_avg_sq", 1.0))
            if "exp_avg" in named and "exp_avg_sq" in named and math.isfinite(limit):
                for first, second in in_chunks(named["exp_avg"], named["exp_avg_sq"]):
                    most = second.sqrt().mul_(limit)
                    torch.clamp(first, -most, most, out=first)

    # -- late ---------------------------------------------------------------------------------

    def add_late(self, movement: Sequence[Moment], steps: int) -> None:
        """Add how far the mean was from the moments so many optimizer steps ago.

        A step multiplies a moment by its beta, and adds what does not depend on it. So what became of it in ``steps``
        steps is moved by beta^steps times as much, which is exact as long as gradients are the same. A second moment
        stays what it is made of: v - beta^steps v_then >= 0, plus beta^steps times a mean.
        """
        named, decays = self._shards.named_moments(), self._shards.moment_decays()
        for moved in movement:
            x = named[moved.master][moved.name]
            x.add_(moved.tensor, alpha=decays[moved.master].get(moved.name, 0.0) ** steps)
            if moved.kind == "second":
                x.clamp_(min=0)  # only rounding makes it negative
        self.bound()

    # -- checkpoints --------------------------------------------------------------------------

    def residuals(self) -> dict[str, Tensor]:
        """Return what rounding has taken away so far, live, by names for a checkpoint."""
        return {
            f"{kind}.{i}": residual
            for kind, wire in sorted(self._differences.items())
            for i, residual in enumerate(wire.residual)
        }

    def load_residuals(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what ``residuals`` returned; without any, from none."""
        self._differences = {}
        if not self._options.rounds or not saved:
            return
        with self._shards.mapped(writes=False):
            self.prepare()
        for name, kept in self.residuals().items():
            if name in saved and saved[name].shape == kept.shape:
                kept.copy_(saved[name])


def largest_ratio(beta1: float, beta2: float) -> float:
    """Return the most that a first moment of Adam can be, in units of the root of the second one; may be infinite.

    m = (1 - beta_1) sum beta_1^k g_k and v = (1 - beta_2) sum beta_2^k g_k^2, and by Cauchy-Schwarz the first sum is at
    most sqrt(sum (beta_1^2 / beta_2)^k) sqrt(sum beta_2^k g_k^2).
    """
    if not beta1**2 < beta2 < 1:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
