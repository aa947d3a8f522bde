"""What belongs to a model and is not trained: buffers, and parameters that the optimizer does not hold, of any dtype.

Knows modules and tensors; must not know peers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ds_pso.utils.checksums import checksum
from ds_pso.utils.chunks import in_chunks

_PART_BYTES = 2**26  # to compare at a sync, if the whole takes no more than _MAX_PARTS such parts
_MAX_PARTS = 16
_DIGEST_BITS = 52  # a float64 holds them exactly, and a sign


def is_averaged(buffer: Tensor) -> bool:
    """True for a buffer that can hold statistics: of a floating dtype in which a mean can be taken."""
    return buffer.is_floating_point() and buffer.element_size() > 1


def look_at(buffers: Iterable[Tensor]) -> tuple[float, int]:
    """Return the sum of the squares of the finite values in averaged buffers, and how many values are not finite."""
    square_norm, odd = 0.0, 0.0
    for buffer in filter(is_averaged, buffers):
        for (part,) in in_chunks(buffer.reshape(-1)):
            finite = torch.isfinite(part)
            values = torch.where(finite, part, 0).to(torch.float64)
            seen = torch.stack([torch.dot(values, values), (~finite).sum(dtype=torch.float64)]).tolist()
            square_norm, odd = square_norm + seen[0], odd + seen[1]
    return square_norm, int(odd)


def digest(tensor: Tensor) -> int:
    """Return 1 to 2^52 - 1, which in all likelihood differs where a bit of the tensor does."""
    mixed = checksum(tensor) * 0x9E3779B97F4A7C15 % 2**64  # so that each bit of the sum counts in the upper ones
    return max(1, mixed >> 64 - _DIGEST_BITS)


def join_digests(digests: Iterable[float]) -> float:
    """Return one digest of several, in their order; negative if one of them is, and 0 if there is none."""
    total, sign = 0, 1
    for value in digests:
        total = (total * 1000003 + int(abs(value))) % 2**_DIGEST_BITS
        sign = -1 if value < 0 else sign
    return float(sign * total)


@contextlib.contextmanager
def as_bytes(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors as flat bytes; writes to them in the block count, also where flattening had to copy."""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    yield flat
    for tensor, values in zip(tensors, flat, strict=True):
        if values.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(values.view(tensor.dtype).view(tensor.shape))


class Frozen:
    """This rank's part of the parameters that are not trained, and the buffers that are not averaged.

    They are the same on all particles, unless somebody changes them. Digests show whether one has changed on some of
    the particles, as a flipped bit in memory does, or on all of them, as a teacher that follows its student does.

    Args:
        trained: names of the parameters that are trained.
        persistent_buffers: returns the buffers that are saved with the module, by name.

    Attributes:
        own: names of the tensors that every particle changes for itself, and that are not compared any more.
    """

    def __init__(
        self, module: nn.Module, trained: Iterable[str], persistent_buffers: Callable[[], list[tuple[str, Tensor]]]
    ) -> None:
        self._module = module
        self._persistent_buffers = persistent_buffers
        self._trained = frozenset(trained)
        self._reference: dict[str, int] = {}
        self.own: set[str] = set()

    def tensors(self) -> dict[str, Tensor]:
        """Return all of them by name, live."""
        parameters = {name: p for name, p in self._module.named_parameters() if name not in self._trained}
        found = {name: getattr(p, "ds_tensor", p) for name, p in parameters.items()}  # ZeRO 3: this rank's block
        return found | {name: b for name, b in self._persistent_buffers() if not is_averaged(b)}

    def counters(self) -> list[Tensor]:
        """Return the buffers that are not averaged, live, in the order of ``persistent_buffers``."""
        return [buffer for _, buffer in self._persistent_buffers() if not is_averaged(buffer)]

    def compared(self) -> dict[str, Tensor]:
        """Return those that may be compared: buffers of one element are counts, of the particle's own steps."""
        counts = {name for name, b in self._persistent_buffers() if b.numel() == 1}
        return {name: tensor for name, tensor in self.tensors().items() if name not in counts}

    def remember(self) -> None:
        """Take the present values for those that all particles have."""
        self._reference = {name: digest(tensor) for name, tensor in self.compared().items()}

    def digest_of_part(self, number: int | None) -> float:
        """Return a digest of a part of what is compared: each part has its turn.

        Args:
            number: counts the parts, over and over; None: of everything.

        Returns:
            See ``join_digests``; negative if a tensor has changed since ``remember``.
        """
        return join_digests(value for value in self.digests(number) if value)

    def digests(self, number: int | None = None) -> list[float]:
        """Return the digest of each tensor, as ``digest_of_part`` does; 0 of those in ``own``."""
        found = []
        for name, tensor in self._part(number).items():
            value = 0 if name in self.own else digest(tensor)
            found.append(float(value if value == self._reference.get(name, value) else -value))
        return found

    def _part(self, number: int | None) -> dict[str, Tensor]:
        tensors = self.compared()
        if number is None:
            return tensors
        total = sum(tensor.nbytes for tensor in tensors.values())
        count = max(1, min(_MAX_PARTS, -(-total // _PART_BYTES)))
        part, begin = {}, 0
        for name, tensor in tensors.items():
            if begin * count // max(1, total) == number % count:
                part[name] = tensor
            begin += tensor.nbytes
        return part
