"""A rank's view of the model: its fp32 master shards, and which parameter each element belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_pso.errors import SwarmError
from ds_pso.shards.engine import Engine
from ds_pso.shards.experts import whole_parameters
from ds_pso.shards.fp32_copies import HALF, Fp32Copies
from ds_pso.shards.optimizer_state import OptimizerState
from ds_pso.shards.tied import TiedWeights
from ds_pso.shards.untrained import Frozen, is_averaged, look_at
from ds_pso.utils.chunks import in_chunks


@dataclass(frozen=True)
class Segment:
    """A run of real elements: where it lies in the shards, and where in its parameter."""

    name: str  # of the parameter in the whole model, as in ``Shards.whole``
    shard: int  # index into Shards.tensors
    shard_start: int
    param_start: int  # offset in the flattened parameter
    numel: int


@dataclass(frozen=True)
class Health:
    """The state of one rank's part of the model at a sync.

    Attributes:
        square_norm: sum of the squares of its weights; not finite if one of them is not.
        buffers_square_norm: likewise of the finite values in its buffers.
        odd_buffer_values: how many more values in its buffers are not finite than by design, so at attach.
        frozen: see ``Frozen.digest_of_part``.
    """

    square_norm: float
    buffers_square_norm: float = 0.0
    odd_buffer_values: int = 0
    frozen: float = 0.0


def intersect(name: str, begin: int, numel: int, window: tuple[int, int], shard: int) -> list[Segment]:
    """Return the part of parameter [begin, begin + numel) of a flat group that lies in this rank's window."""
    start, stop = max(begin, window[0]), min(begin + numel, window[1])
    if start >= stop:
        return []
    return [Segment(name, shard, start - window[0], start - begin, stop - start)]


def equal_parts(numels: Sequence[int], parts: int) -> list[list[tuple[int, int, int]]]:
    """Cut tensors of these sizes into ``parts`` runs of nearly equal length: (tensor, start, stop)."""
    total = sum(numels)
    cut: list[list[tuple[int, int, int]]] = []
    for part in range(parts):
        begin, end = total * part // parts, total * (part + 1) // parts
        pieces, offset = [], 0
        for index, numel in enumerate(numels):
            start, stop = max(begin, offset), min(end, offset + numel)
            if start < stop:
                pieces.append((index, start - offset, stop - offset))
            offset += numel
        cut.append(pieces)
    return cut


class Shards(ABC):
    """The fp32 master weights that this rank owns: about 1/S of the model, flat, live.

    Writing to ``tensors`` changes the optimizer's own memory, or fp32 copies of it where the masters are in half
    precision; ``publish`` then brings masters and working weights of the whole particle in line. Call it on all ranks
    of the particle, outside forward and backward.

    Attributes:
        whole: the parameters of the particle's model, of which some may lie on other ranks.
    """

    optimizer: Any  # a subclass says what it uses of it

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.module = engine.module
        self.whole = whole_parameters(self.module)
        self._names = {id(parameter.like): parameter.name for parameter in self.whole if parameter.is_here}
        self._copies = Fp32Copies()
        with self.mapped(writes=False):
            if any(master.dtype in HALF for master in self._masters()):
                self._drop_copies_at_a_step()
        self.segments = self._find_segments()
        self.padding = _gaps(self.segments, self.numels)
        trained = self.trained_names()
        trained_here = {name for name, p in self.module.named_parameters() if self._names[id(p)] in trained}
        self._tied = TiedWeights(engine, self.name_of, trained)
        self.frozen = Frozen(self.module, trained_here, self.persistent_buffers)
        self._states = [OptimizerState(o, has_stepped=engine.global_steps > 0) for o in self._optimizers()]
        self._has_frozen = bool(self.frozen.compared())
        self.odd_by_design = self._look_at_buffers()[1]
        self._lr_factor = 1.0
        self._lr_hooked = False

    def _drop_copies_at_a_step(self) -> None:
        copies = self._copies
        handle = self.engine.basic_optimizer.register_step_pre_hook(lambda *_: copies.drop())
        weakref.finalize(self, handle.remove)

    @abstractmethod
    def _masters(self) -> Sequence[Tensor]:
        """Return the optimizer's own masters, by which it also keeps its state."""

    @property
    def tensors(self) -> list[Tensor]:
        """Flat fp32 tensors, detached, in the optimizer's memory; of masters in half precision copies."""
        return self._copies.of(self._masters())

    def _optimizers(self) -> list[Any]:
        """Return DeepSpeed's optimizer, and any other that trains some of the masters."""
        return [self.optimizer]

    @property
    def numels(self) -> list[int]:
        """The sizes of ``tensors``, which may be asked for at any time, beside a step, too."""
        return [master.numel() for master in self._masters()]  # not of copies, which would be made anew

    def mapped(self, *, writes: bool = True) -> contextlib.AbstractContextManager[None]:
        """In the block, ``tensors`` and ``moments`` are there; blocks may be nested.

        Outside of one they are files, where DeepSpeed keeps them on NVMe.

        Args:
            writes: whether what is written to them counts.
        """
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In the block, ``tensors`` are the weights to evaluate: for a schedule-free optimizer not those that train."""
        try:
            with self._states[0].evaluating(self._masters()):
                self._copies.refresh(self._masters())
                yield
        finally:
            self._copies.refresh(self._masters())

    @property
    def is_schedule_free(self) -> bool:
        """True if the weights to evaluate are not those that train."""
        return self._states[0].is_schedule_free

    @abstractmethod
    def _find_segments(self) -> list[Segment]:
        """Return the segments in ascending order of (shard, shard_start)."""

    @abstractmethod
    def _parameters(self) -> Sequence[Sequence[object]]:
        """Return all parameters that the optimizer trains, on whatever rank their elements lie."""

    def publish(self) -> None:
        """Make the working weights of every rank of the particle the cast of the masters."""
        self._tied.equalise(self.tensors, self.segments)
        self.store()
        self._publish_masters()

    def store(self) -> None:
        """Round ``tensors`` to masters in half precision; where these are fp32, they are the same."""
        self._copies.store(self._masters())

    @abstractmethod
    def _publish_masters(self) -> None:
        """Bring the working weights of all ranks of the particle in line with the masters."""

    def trained_names(self) -> set[str]:
        """Return the names of all parameters that the particle trains, equal on all ranks.

        Of experts on other ranks, those are taken to be trained whose place is trained in an expert here.
        """
        here = {self.name_of(parameter) for group in self._parameters() for parameter in group}
        return {parameter.name for parameter in self.whole if self._names[id(parameter.like)] in here}

    def name_of(self, parameter: object) -> str:
        """Return the name of a parameter of the optimizer, as in ``whole``."""
        try:
            return self._names[id(parameter)]
        except KeyError:
            raise SwarmError(
                "the optimizer holds a parameter that is not in engine.module; give deepspeed.initialize "
                "the parameters of the model it trains"
            ) from None

    def check_ready(self) -> None:
        """Raise SwarmError where a sync would change other weights than those that train.

        So it is while ``engine.offload_states()`` is in force, and in the eval mode of a schedule-free optimizer.
        """
        if getattr(self.optimizer, "offloaded_states", None):
            raise SwarmError("the optimizer's states are offloaded; call engine.reload_states() before engine.step()")
        if self._states[0].is_in_eval_mode:
            raise SwarmError(
                "the optimizer is in eval mode, in which its weights are not those that train; call optimizer.train() "
                "before the sync"
            )

    def prepare(self) -> None:
        """Make the shards ready for an exchange.

        Raises:
            SwarmError: as ``check_ready`` does.
        """
        self.check_ready()
        self._copies.refresh(self._masters())
        self.zero_padding()

    @property
    def has_buffers(self) -> bool:
        """True if there are persistent floating-point buffers."""
        return bool(self.buffers())

    def zero_padding(self) -> None:
        """Set alignment padding, which may hold anything, NaN included, to zero."""
        if self.padding:
            tensors = self.tensors
            for shard, start, stop in self.padding:
                tensors[shard][start:stop].zero_()

    def health(self, part: int | None) -> Health:
        """Look at weights, buffers and what is not trained, each by itself. Padding must be zero.

        Args:
            part: of what is not trained; see ``Frozen.digest_of_part``.
        """
        square_norm, odd = self._look_at_buffers()
        frozen = self.frozen.digest_of_part(part) if self._has_frozen else 0.0
        return Health(self.square_norm(), square_norm, max(0, odd - self.odd_by_design), frozen)

    def _look_at_buffers(self) -> tuple[float, int]:
        buffers = [buffer for _, buffer in self.persistent_buffers()]
        return look_at(buffers) if buffers else (0.0, 0)  # of those that are averaged

    def remember_start(self) -> None:
        """Take the model as it is for the one that all particles begin with."""
        self.odd_by_design = self._look_at_buffers()[1]
        self.frozen.remember()

    def square_norm(self) -> float:
        """Return the sum of the squares of this rank's weights; not finite if one of them is not. Padding must be zero.

        One pass over the memory says two things: whether all is finite, and whether something is far too large. That
        is what memory that flips a bit does to a weight: with the top bit of the exponent an |x| < 2 becomes
        2^128 |x|, above all norms of real models, and of the other bits none takes it to 2 or more. So a single flip
        is either harmless or as plain in the norm as it would be in max |x|, which takes several times as long.
        """
        total = 0.0
        for tensor in self.tensors:
            if tensor.numel():
                total += square_of_norm(tensor)
        return total

    def moments(self) -> list[Tensor]:
        """Return the optimizer's moments for ``tensors``, flat and live, in an order that is equal on all peers.

        Empty before the first step.
        """
        return [moment for named in self.named_moments() for moment in named.values()]

    def named_moments(self) -> list[dict[str, Tensor]]:
        """Return ``moments`` by name, those of each master by themselves."""
        return [self._moments_of(master) for master in self._masters()]

    def moment_decays(self) -> list[dict[str, float]]:
        """Return by what an optimizer step multiplies each of ``named_moments``, as far as that is known."""
        return [self._decays_of(number) for number in range(len(self._masters()))]

    def _decays_of(self, number: int) -> dict[str, float]:
        """Return the decays of the moments of a master."""
        master = self._masters()[number]
        for state in self._states:
            for group in state.groups:
                if any(parameter is master for parameter in group["params"]):
                    return state.decays(group, self._moments_of(master))
        return {}

    def _moments_of(self, master: Tensor) -> dict[str, Tensor]:
        return {name: moment for state in self._states for name, moment in state.moments_of(master).items()}

    def why_no_mean(self) -> str | None:
        """Return why the optimizer's state cannot be averaged; None if it can, or if there is none yet."""
        for state in self._states:
            for name in state.without_mean():
                return f"{type(state.inner).__name__} keeps {name!r}, which is no moment of gradients, and has no mean"
        return None

    def publish_moments(self) -> None:  # noqa: B027
        """Bring the optimizers of the whole particle in line with ``moments``, after writing to these."""

    def reset_optimizer_state(self) -> None:
        """Let the particle's optimizer begin anew, with its weights as they are.

        Clearing only what is not finite would leave a huge first moment over a zeroed second one.
        """
        for state in self._states:
            state.reset()
        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False  # to tensors that are gone

    def reloaded(self) -> None:
        """Take note that DeepSpeed has loaded its checkpoint."""
        with self.mapped(writes=False):
            self._copies.refresh(self._masters())

    @property
    def lr_factor(self) -> float:
        """The factor by which the optimizer's learning rates are multiplied while it takes a step."""
        return self._lr_factor

    @lr_factor.setter
    def lr_factor(self, factor: float) -> None:
        # Not in param_groups: there a schedule writes, or reads what it wrote before.
        if factor != 1.0 and not self._lr_hooked:
            for optimizer in [self.engine.basic_optimizer, *self._optimizers()[1:]]:
                optimizer.register_step_pre_hook(lambda stepping, *_: self._scale_lr(stepping))
                optimizer.register_step_post_hook(lambda stepping, *_: self._restore_lr(stepping))
            self._lr_hooked = True
        self._lr_factor = factor

    def _scale_lr(self, optimizer: torch.optim.Optimizer) -> None:
        self._scheduled_lr = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._lr_factor

    def _restore_lr(self, optimizer: torch.optim.Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._scheduled_lr, strict=True):
            group["lr"] = lr

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Return the persistent floating-point buffers (batch-norm statistics and the like), by name."""
        return [(name, buffer) for name, buffer in self.persistent_buffers() if is_averaged(buffer)]

    def persistent_buffers(self) -> list[tuple[str, Tensor]]:
        """Return the buffers that are saved with the module, of any dtype, by name."""
        found = []
        for prefix, module in self.module.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found.append((f"{prefix}.{name}" if prefix else name, buffer))
        return found

    @contextlib.contextmanager
    def flat_buffers(self) -> Iterator[list[Tensor]]:
        """Yield the buffers, flat; writes to them in the block count, also where flattening had to copy."""
        buffers = [buffer for _, buffer in self.buffers()]
        flat = [buffer.reshape(-1) for buffer in buffers]
        yield flat
        for buffer, values in zip(buffers, flat, strict=True):
            if values.data_ptr() != buffer.data_ptr():
                buffer.copy_(values.view(buffer.shape))

    def fingerprint(self) -> str:
        """Return a hash that is equal on two ranks exactly when their shards hold the same slices of the same model."""
        segments = [(s.name, s.shard, s.shard_start, s.param_start, s.numel) for s in self.segments]
        sizes = self.numels
        shapes = [(p.name, list(getattr(p.like, "ds_shape", p.like.shape)), str(p.like.dtype)) for p in self.whole]
        buffers = [(name, list(b.shape), str(b.dtype)) for name, b in self.persistent_buffers()]
        text = json.dumps([type(self.optimizer).__name__, segments, sizes, shapes, buffers])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def square_of_norm(flat: Tensor) -> float:
    """Return ||flat||^2, summed in fp32 inside a chunk and in fp64 over them; not finite if an element is not."""
    wide = torch.promote_types(flat.dtype, torch.float32)
    parts = []
    for (part,) in in_chunks(flat):
        part = part.to(wide)
        parts.append(torch.dot(part, part))
    total = float(torch.stack(parts).sum(dtype=torch.float64))
    if math.isfinite(total):
        return total
    # Finite numbers above 1e19 have squares that only fp64 can hold.
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2


def replace(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the values into the targets, one into each."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _gaps(segments: Sequence[Segment], numels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the (shard, start, stop) that no segment covers."""
    gaps, ends = [], [0] * len(numels)
    for segment in segments:
        if segment.shard_start > ends[segment.shard]:
            gaps.append((segment.shard, ends[segment.shard], segment.shard_start))
        ends[segment.shard] = segment.shard_start + segment.numel
    gaps += [(shard, end, numel) for shard, (end, numel) in enumerate(zip(ends, numels, strict=True)) if end < numel]
    return sorted(gaps)
