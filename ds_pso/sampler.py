"""Shards a dataset over all P x S ranks of the swarm, and continues where a checkpoint stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from ds_pso.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """What a rank takes of each round of samples, where particles have batches of their own.

    Attributes:
        start: where its samples begin in a round.
        size: how many they are.
        total: samples of a round, of all ranks: an optimizer step of all particles.
    """

    start: int
    size: int
    total: int

    @classmethod
    def of(cls, samples: Sequence[int], particle_size: int, rank: int) -> Share:
        """Return the share of a rank.

        Args:
            samples: of an optimizer step, on each rank of each particle.
            particle_size: ranks of a particle, of which the next ``particle_size`` ranks are the next one.
        """
        sizes = [number for number in samples for _ in range(particle_size)]
        return cls(sum(sizes[:rank]), sizes[rank], sum(sizes))


class SwarmSampler(Sampler[int]):
    """Every rank sees its own part of the data, reshuffled in each epoch.

    Give it to a ``DataLoader`` with the same ``batch_size``. The swarm advances it by one batch
    at each ``engine.backward``, so that its place is what was trained on, not what the loader's
    workers have fetched ahead. Iterating goes on from that place to the end of the epoch, or until
    ``load_state_dict`` moves the place elsewhere: the next iteration begins there.

    Each rank takes the same whole number of batches per epoch; the fewer than
    ``world_size * batch_size`` samples left over are others in every epoch. With a ``share`` it is the number of
    optimizer steps per epoch that is the same for all.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        share: Share | None = None,
    ) -> None:
        self._dataset_size = len(dataset)
        self._rank, self._world_size = rank, world_size
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._in_turn = share is None  # sample after sample, as DistributedSampler does
        self._share = share = share or Share(rank * batch_size, batch_size, world_size * batch_size)
        self._num_rounds = self._dataset_size // share.total
        self._num_batches = self._num_rounds * share.size // batch_size
        if self._num_batches == 0 and not self._in_turn:
            raise ConfigError(
                f"the dataset has {self._dataset_size} samples, and an optimizer step of all particles takes "
                f"{share.total}; use more data, fewer particles or smaller batches"
            )
        if self._num_batches == 0:
            raise ConfigError(
                f"the dataset has {self._dataset_size} samples, and {world_size} ranks with micro batches of "
                f"{batch_size} need at least {world_size * batch_size}; use more data, fewer ranks or a smaller batch"
            )
        self.epoch = 0
        # Called when an epoch goes on in the middle: a new DataLoader iterator has just drawn a random
        # number that the uninterrupted run did not draw.
        self.on_resume: Callable[[], None] | None = None
        self._batch = 0  # batches trained on in this epoch
        self._moves = 0  # how often the place was moved elsewhere
        self._yielded = self._rows = self._backwards = 0  # samples and batches since an iteration began

    @property
    def num_ranks(self) -> int:
        """The number of ranks, or of groups of ranks, that share the data."""
        return self._world_size

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        return self._num_batches * self._batch_size

    def __iter__(self) -> Iterator[int]:
        on_resume, self.on_resume = self.on_resume, None
        if on_resume is not None and self._batch > 0:
            on_resume()
        order = list(range(self._dataset_size))
        if self._shuffle:
            seed = int(np.random.SeedSequence([self._seed, self.epoch]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self._dataset_size, generator=generator).tolist()
        mine = self._mine(order)
        self.check_batches()
        moves, self._yielded, self._rows, self._backwards = self._moves, 0, 0, 0
        for start in range(self._batch * self._batch_size, len(mine), self._batch_size):
            if self._moves != moves:
                return
            self._yielded += self._batch_size
            yield from mine[start : start + self._batch_size]

    def _mine(self, order: list[int]) -> list[int]:
        """Return the samples of this rank, in an order of all."""
        if self._in_turn:
            return order[self._rank :: self._world_size][: len(self)]
        start, size, total = self._share.start, self._share.size, self._share.total
        begins = range(start, self._num_rounds * total, total)
        return [sample for begin in begins for sample in order[begin : begin + size]]

    def advance(self) -> None:
        """Count one more batch as trained on."""
        self._backwards += 1
        self._batch += 1
        if self._batch == self._num_batches:
            self.epoch, self._batch = self.epoch + 1, 0

    def saw(self, rows: int) -> None:
        """Take note that the model was given so many samples to train on."""
        self._rows += rows

    def check_batches(self) -> None:
        """Warn if the loader's batches are not those that are counted: epochs would get shorter, or be cut off.

        The model has seen every sample that was dealt out, and in another number of batches.
        """
        expected = self._backwards * self._batch_size
        # Between the ends of a pipeline nobody asks for samples, and each backward counts all the same.
        if self._rank == 0 and 0 < self._yielded == self._rows != expected and self._backwards:
            warnings.warn(
                f"swarm.sampler counts batches of {self._batch_size}, and {self._yielded} samples came in "
                f"{self._backwards} batches of about {round(self._yielded / self._backwards)}: so it loses its place "
                "in the data; give swarm.sampler the batch_size of the DataLoader",
                stacklevel=3,
            )
        self._yielded = self._rows = self._backwards = 0

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch``; does nothing in the middle of that very epoch."""
        if epoch != self.epoch:
            self.epoch, self._batch = epoch, 0

    def skip_to(self, batch: int) -> None:
        """Go on with this batch of the epoch; does nothing at that place, as after a checkpoint was loaded.

        Raises:
            ConfigError: the epoch has begun, and is elsewhere; or is shorter.
        """
        if self._batch not in (0, batch) or not 0 <= batch < self._num_batches:
            raise ConfigError(
                f"skip to batch {batch} of the epoch: training is at batch {self._batch} of {self._num_batches}; a "
                "checkpoint that was loaded has put it there, so leave the skipping out"
            )
        if batch != self._batch:
            self._batch = batch
            self._moves += 1

    def state_dict(self) -> dict[str, int]:
        return {
            "dataset_size": self._dataset_size,
            "batch_size": self._batch_size,
            "seed": self._seed,
            "share": self._share.size,
            "of_all": self._share.total,
            "epoch": self.epoch,
            "batch": self._batch,
        }

    def check(self, state: dict[str, int]) -> str | None:
        """Return why ``state`` belongs to other data; None if it fits."""
        mine = self.state_dict()
        for key in ("dataset_size", "batch_size", "seed", "share", "of_all"):
            if state[key] != mine[key]:
                return f"the data's {key} was {state[key]} and is {mine[key]} now"
        return None

    def is_shared_otherwise(self, state: dict[str, int]) -> bool:
        """Return true if another number of ranks shared the data, as with other groups for sequence parallelism."""
        return state["of_all"] * self._share.size != self._share.total * state["share"]

    def continued(self, state: dict[str, int]) -> dict[str, int]:
        """Return the state of a sampler that shared the data in another way as this one's, for ``load_state_dict``.

        What was trained on are the first samples in the order of the epoch; this one goes on behind them, or
        up to one optimizer step of all particles before.
        """
        seen = state["batch"] * state["batch_size"] * state["of_all"] // state["share"]
        epoch, batch = state["epoch"], seen // self._share.total * self._share.size // self._batch_size
        if batch == self._num_batches:
            epoch, batch = epoch + 1, 0
        mine = {"batch_size": self._batch_size, "share": self._share.size, "of_all": self._share.total}
        return {**state, **mine, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._moves += 1
