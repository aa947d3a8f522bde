"""Moves tensors between the particles, in buckets of bounded memory, and counts the bytes.

Knows the peer group; knows nothing of rules or of DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pso.comm.collectives import Collectives
from ds_pso.comm.compression import Differences, Format, PartialFormat
from ds_pso.distributed.world import World
from ds_pso.utils.checksums import Added, Copied
from ds_pso.utils.chunks import in_chunks


@dataclass(frozen=True)
class Piece:
    """A run of elements of one flat tensor, and its place in the bucket that carries it."""

    tensor: int  # index of the tensor
    start: int  # first element in the tensor
    stop: int  # one past the last
    offset: int  # first element in the bucket

    def of(self, flat: Tensor) -> Tensor:
        """Return its elements in the tensor."""
        return flat[self.start : self.stop]

    def in_bucket(self, bucket: Tensor) -> Tensor:
        """Return its elements in the bucket."""
        return bucket[self.offset : self.offset + self.stop - self.start]


def fill(tensors: Sequence[Tensor], arriving: Iterable[tuple[Piece, Tensor]]) -> None:
    """Copy what arrives into its places in ``tensors``."""
    for piece, received in arriving:
        piece.of(tensors[piece.tensor]).copy_(received)


def plan_buckets(numels: Sequence[int], bucket_numel: int) -> list[list[Piece]]:
    """Cut tensors of these sizes into buckets of at most ``bucket_numel`` elements.

    Every element of every tensor is in exactly one piece, in order; only the last bucket is not
    full. Empty tensors have no piece.
    """
    buckets: list[list[Piece]] = []
    room = 0
    for index, numel in enumerate(numels):
        start = 0
        while start < numel:
            if room == 0:
                buckets.append([])
                room = bucket_numel
            stop = min(numel, start + room)
            buckets[-1].append(Piece(index, start, stop, bucket_numel - room))
            room -= stop - start
            start = stop
    return buckets


def wire_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which such tensors travel: fp32 at least, in which they can be summed, and bytes as bytes."""
    return torch.uint8 if tensor.dtype == torch.uint8 else torch.promote_types(tensor.dtype, torch.float32)


def _withhold(rest: Tensor, pieces: Sequence[Piece], differences: Differences, scale: float) -> None:
    """Keep what has not been sent of a bucket.

    Args:
        rest: what is left of the bucket; it is overwritten.
        scale: from what is sent to weights.
    """
    rest.nan_to_num_(0.0, 0.0, 0.0)  # what overflowed would stay in it for ever
    if differences.in_weights:
        differences.rest = rest * scale
        return
    for piece in pieces:
        piece.of(differences.residual[piece.tensor]).copy_(piece.in_bucket(rest))


class Exchange:
    """Moves flat tensors between the particles; the same calls in the same order on all peers.

    ``bytes_received`` counts what this rank receives under the bandwidth-optimal algorithm for
    each collective, N bytes in a group of P: 2 N (P - 1) / P for an all-reduce, N for a
    broadcast (0 at the source) or a part in an all-to-all, N (P - 1) for an all-gather. Summed over the group it is the
    whole traffic. Where differences are sent, N is their encoded size, padded to whole blocks. P is the number of
    particles that are present; weights and sources stand for all, and of those that are absent they do not count. With
    ``checksums``, an all-gather of a few numbers follows each collective, and counts, too; and what has been damaged
    on the way is moved again before anybody uses it.

    Attributes:
        particle: the number of this rank's particle.
        num_particles: P, those that are absent included.
        device: where the tensors lie that are moved.
        collectives: runs, times and counts them.
        traffic: sums so far.
    """

    def __init__(self, world: World, bucket_mb: float, *, checksums: bool = False) -> None:
        self.world = world
        self.particle, self.num_particles = world.layout.particle, world.layout.num_particles
        self.collectives = Collectives(world, checksums=checksums)
        self.device, self.traffic = self.collectives.device, self.collectives.traffic
        self.bucket_bytes = int(bucket_mb * 2**20)

    @property
    def present(self) -> Sequence[int]:
        """The particles of the peer group, in its order."""
        return self.world.peers.present

    @property
    def bytes_received(self) -> int:
        """Bytes that this rank has received so far."""
        return self.traffic.bytes_received

    def weighted_mean(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[tuple[Piece, Tensor]]:
        """Yield, piece by piece, sum_i weights[i] * (the tensor of particle i).

        A particle of weight 0 contributes exact zeros, whatever its tensors hold (NaN, too).
        ``tensors`` are flat and of floating dtype, with the same sizes on every peer; those
        already yielded may be overwritten. A yielded tensor is valid until the next one.
        """
        present = len(self.present)
        share = 2 * (present - 1) / present
        for bucket, pieces in self._buckets(tensors):
            weigh = partial(self._weigh, bucket, pieces, tensors, weights[self.particle])
            weigh()
            received, moved = share * bucket.nbytes, partial(Added, bucket)
            self.collectives.run("all-reduce", "allreduce", ([bucket],), received, moved=moved, refill=weigh)
            yield from self._unpack(bucket, pieces, tensors)

    def mean_by_differences(
        self, tensors: Sequence[Tensor], weights: Sequence[float], differences: Differences, *, feedback: bool
    ) -> Iterator[tuple[Piece, Tensor]]:
        """``weighted_mean`` in few bytes: the same bits on every peer, up to what ``differences.format`` withholds.

        Two phases: each peer sends every other one its part of the weighted differences to ``differences.common``,
        sums the parts that it got, and sends the sum to all. So the bytes do not grow with P. In a ``PartialFormat``
        each peer sends the differences to all others, and the mean of each element is over those who have sent it.

        Args:
            weights: sum to one.
            feedback: what is withheld here goes with the next message, and what is yielded is common knowledge
                from then on; false for a mean that may be thrown away.
        """
        form, weight = differences.format, weights[self.particle]
        partial_format = form if isinstance(form, PartialFormat) else None
        scale = weight if partial_format is None else float(weight != 0)
        unit = len(self.present) * form.block if partial_format is None else form.block
        for pieces, values in self._blocks(tensors, unit):
            for piece in pieces:
                here, common = piece.of(tensors[piece.tensor]), piece.of(differences.common[piece.tensor])
                for part, x, c in in_chunks(piece.in_bucket(values), here, common):
                    if weight != 0:
                        torch.sub(x.to(part), c.to(part), out=part).mul_(scale)
                if feedback and differences.residual and (weight != 0 or partial_format is None):
                    residual = piece.of(differences.residual[piece.tensor])
                    for part, e in in_chunks(piece.in_bucket(values), residual):
                        part.add_(e.to(part), alpha=differences.decay)
            if partial_format is None:
                mean = self._mean_of_sums(values, pieces, differences, weight, feedback=feedback)
            else:
                mean = self._mean_of_sent(values, pieces, differences, weights, partial_format, feedback=feedback)
            become_common = feedback and not differences.from_zero
            yield from self._add_common(mean, pieces, differences, become_common=become_common)

    def _mean_of_sums(
        self, values: Tensor, pieces: list[Piece], differences: Differences, weight: float, *, feedback: bool
    ) -> Tensor:
        """Return the mean of the weighted differences in ``values``, in its memory."""
        encoded = self._sum_rounded(values, differences.format)
        if feedback:
            _withhold(values, pieces, differences, 1 / weight if weight else 0.0)
        for part, row in zip(values.chunk(len(self.present)), self._gather_parts(encoded), strict=True):
            differences.format.decode(row, part)
        return values

    def _mean_of_sent(
        self,
        values: Tensor,
        pieces: list[Piece],
        differences: Differences,
        weights: Sequence[float],
        form: PartialFormat,
        *,
        feedback: bool,
    ) -> Tensor:
        """Return the mean of the differences in ``values`` over those who have sent an element."""
        encoded = torch.empty(form.nbytes(len(values)), dtype=torch.uint8, device=values.device)
        form.encode_and_subtract(values, encoded)
        if feedback and (weights[self.particle] or differences.in_weights):
            _withhold(values, pieces, differences, 1.0)
        total, senders = torch.zeros_like(values), torch.zeros_like(values)
        for particle, row in zip(self.present, self._gather_parts(encoded), strict=True):
            if weights[particle] != 0:
                form.add_sent(row, weights[particle], total, senders)
        return total.div_(senders.masked_fill_(senders == 0, 1))

    def from_one_by_differences(
        self, tensors: Sequence[Tensor], source: int, differences: Differences
    ) -> Iterator[tuple[Piece, Tensor]]:
        """``from_one`` in few bytes: the same bits on every peer, the source too.

        What is rounded away is part of the next difference, whoever sends it.
        """
        for pieces, values in self._blocks(tensors, len(self.present) * differences.format.block):
            encoded = torch.empty(differences.format.nbytes(len(values)), dtype=torch.uint8, device=values.device)
            if self.particle == source:
                for piece in pieces:
                    here, common = piece.of(tensors[piece.tensor]), piece.of(differences.common[piece.tensor])
                    for part, x, c in in_chunks(piece.in_bucket(values), here, common):
                        torch.sub(x.to(part), c.to(part), out=part)
                differences.format.encode(values, encoded)
            encoded = self._broadcast(encoded.to(self.device), source).to(values.device)
            differences.format.decode(encoded, values)
            yield from self._add_common(values, pieces, differences, become_common=True)

    def from_one(self, tensors: Sequence[Tensor], source: int) -> Iterator[tuple[Piece, Tensor]]:
        """Yield, piece by piece, the tensors of particle ``source``."""
        for bucket, pieces in self._buckets(tensors):
            if self.particle == source:
                self._fill(bucket, pieces, tensors)
            yield from self._unpack(self._broadcast(bucket, source), pieces, tensors)

    def from_each(self, tensors: Sequence[Tensor], sources: Sequence[int]) -> Iterator[tuple[Piece, Tensor]]:
        """Yield, piece by piece, the tensors of particle ``sources[i]`` to particle i."""
        me, source, present = self.particle, sources[self.particle], self.present
        if all(sources[i] == source for i in present):
            yield from self.from_one(tensors, source)
            return
        takers = [i != me and sources[i] == me for i in present]
        for bucket, pieces in self._buckets(tensors):
            self._fill(bucket, pieces, tensors)
            copies = bucket.repeat(sum(takers))
            outgoing = [bucket if taker else None for taker in takers]
            send = [bucket.numel() * taker for taker in takers]
            receive = [bucket.numel() * (i == source != me) for i in present]
            arrived = bucket.new_empty(sum(receive))
            moved = partial(Copied, outgoing, [arrived if numel else None for numel in receive])
            self._all_to_all(arrived, copies, receive, send, moved)
            yield from self._unpack(bucket if source == me else arrived, pieces, tensors)

    def from_self(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """Yield, piece by piece, the particle's own tensors: for work that must not need much memory at once."""
        for pieces in plan_buckets([t.numel() for t in tensors], max(1, self.bucket_bytes // 4)):
            for piece in pieces:
                yield piece, piece.of(tensors[piece.tensor])

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return a few float64 of every particle, exactly, in the order of particles; NaN of those that are absent."""
        if self.num_particles == 1:
            return [list(values)]
        mine, present = torch.tensor(values, dtype=torch.float64, device=self.device), self.present
        table, rows = [[math.nan] * len(values)] * self.num_particles, [torch.empty_like(mine) for _ in present]
        moved = partial(Copied, [mine] * len(rows), rows)
        self.collectives.run("all-gather", "allgather", ([rows], [mine]), (len(rows) - 1) * mine.nbytes, moved=moved)
        for particle, row in zip(present, rows, strict=True):
            table[particle] = row.tolist()
        return table

    def _all_to_all(
        self, arrived: Tensor, sent: Tensor, receive: list[int], send: list[int], moved: Callable[[], Copied]
    ) -> None:
        """Send ``send[i]`` elements to the i-th peer, one behind the other, and receive ``receive[i]`` from it."""
        arguments = (arrived, sent, receive, send)
        self.collectives.run("all-to-all", "alltoall_base", arguments, arrived.nbytes, moved=moved)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        options, present = dist.BroadcastOptions(), self.present
        options.rootRank, options.rootTensor = present.index(source), 0
        received = 0 if self.particle == source else tensor.nbytes
        mine = [tensor if self.particle == source else None] * len(present)
        theirs = [tensor if i == source != self.particle else None for i in present]
        moved = partial(Copied, mine, theirs)
        self.collectives.run("broadcast", "broadcast", ([tensor], options), received, moved=moved)
        return tensor

    def _sum_rounded(self, values: Tensor, form: Format) -> Tensor:
        """Return the sum over all peers of their values in this particle's part, rounded twice, as bytes.

        What remains in ``values`` is what was rounded away here.
        """
        present = self.present
        parts, here = values.chunk(len(present)), present.index(self.particle)
        mine, others = parts[here], [i for i in range(len(parts)) if i != here]
        encoded = torch.empty(form.nbytes(len(mine)), dtype=torch.uint8, device=values.device)
        outgoing = encoded.new_empty(len(others), len(encoded))
        for row, other in zip(outgoing, others, strict=True):
            form.encode_and_subtract(parts[other], row)
        for row in self._swap_parts(outgoing):
            form.add_decoded(row, mine)
        form.encode_and_subtract(mine, encoded)  # this second residual stays with who made it
        return encoded

    def _swap_parts(self, outgoing: Tensor) -> Tensor:
        """Send a row (P - 1, n) to each other peer. Return those that they sent, in the order of particles."""
        sizes = [outgoing.shape[1] * (i != self.particle) for i in self.present]
        sent = outgoing.view(-1).to(self.device)
        arrived = torch.empty_like(sent)
        self._all_to_all(arrived, sent, sizes, sizes, lambda: Copied(sent.split(sizes), arrived.split(sizes)))
        return arrived.to(outgoing.device).view_as(outgoing)

    def _gather_parts(self, encoded: Tensor) -> list[Tensor]:
        """Return the bytes (n,) of every particle, in the order of particles."""
        return [row.to(encoded.device) for row in self._gather(encoded.to(self.device))]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """Return a tensor like ``mine`` from every peer, in the order of particles."""
        rows = [torch.empty_like(mine) for _ in self.present]
        moved = partial(Copied, [mine] * len(rows), rows)
        self.collectives.run("all-gather", "allgather", ([rows], [mine]), (len(rows) - 1) * mine.nbytes, moved=moved)
        return rows

    def _blocks(self, tensors: Sequence[Tensor], unit: int) -> Iterator[tuple[list[Piece], Tensor]]:
        """Yield buckets of fp32 zeros, of a multiple of ``unit`` elements."""
        capacity = max(1, self.bucket_bytes // (4 * unit)) * unit
        numels = [t.numel() for t in tensors]
        buffer = torch.empty(
            min(capacity, -(-sum(numels) // unit) * unit), device=tensors[0].device if tensors else None
        )
        for pieces in plan_buckets(numels, capacity):
            size = pieces[-1].offset + pieces[-1].stop - pieces[-1].start
            yield pieces, buffer[: -(-size // unit) * unit].zero_()

    @staticmethod
    def _add_common(
        values: Tensor, pieces: list[Piece], differences: Differences, *, become_common: bool
    ) -> Iterator[tuple[Piece, Tensor]]:
        for piece in pieces:
            whole = piece.in_bucket(values)
            for part, common in in_chunks(whole, piece.of(differences.common[piece.tensor])):
                part.add_(common.to(part))
                if become_common:
                    common.copy_(part)
            yield piece, whole

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Piece]]]:
        dtypes = list(map(wire_dtype, tensors))
        for dtype in sorted(set(dtypes), key=str):
            numels = [t.numel() if own == dtype else 0 for t, own in zip(tensors, dtypes, strict=True)]
            capacity = max(1, self.bucket_bytes // dtype.itemsize)
            buffer = torch.empty(min(capacity, sum(numels)), dtype=dtype, device=self.device)
            for pieces in plan_buckets(numels, capacity):
                last = pieces[-1]
                yield buffer[: last.offset + last.stop - last.start], pieces

    @staticmethod
    def _weigh(bucket: Tensor, pieces: list[Piece], tensors: Sequence[Tensor], weight: float) -> None:
        """Fill the bucket with what this particle contributes."""
        if weight == 0:
            bucket.zero_()
        else:
            for piece in pieces:
                for part, x in in_chunks(piece.in_bucket(bucket), piece.of(tensors[piece.tensor])):
                    part.copy_(x).mul_(weight)

    @staticmethod
    def _fill(bucket: Tensor, pieces: list[Piece], tensors: Sequence[Tensor]) -> None:
        for piece in pieces:
            piece.in_bucket(bucket).copy_(piece.of(tensors[piece.tensor]))

    @staticmethod
    def _unpack(bucket: Tensor, pieces: list[Piece], tensors: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        for piece in pieces:
            target = tensors[piece.tensor]
            yield piece, piece.in_bucket(bucket).to(device=target.device, dtype=target.dtype)
