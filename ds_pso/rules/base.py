"""What a sync rule is: a plan made from fitness alone, and an elementwise update of a shard.

A rule never communicates. It says what it needs from its peers (``Plan.receive``) and the
exchange moves just that. All methods are pure: what must survive from one sync point to the
next lies in ``state`` (tensors like the shard) and in ``memory`` (JSON values, equal on all ranks),
so the same rule runs under ZeRO, in a simulation of many particles, and in a unit test.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ds_pso.utils.strict_model import StrictModel

State = MutableMapping[str, Tensor]  # name -> tensor of the shape, dtype and device of the shard


class RuleConfig(StrictModel):
    """Options of a rule: the subsection of ``swarm`` that has the rule's name."""


@dataclass(frozen=True)
class SyncPoint:
    """What every rank of every particle knows alike when the particles meet.

    Attributes:
        index: how many sync points came before.
        fitness: loss of each particle, shape (P,); lower is better.
        alive: shape (P,); false: loss or weights are not finite, or far above those of the others.
        total: sync points of the whole training; None: nobody said.
        steps: optimizer steps of each particle since the last sync point, shape (P,).
        done: part of the training that is over; None: what evenly spaced sync points make of it.
        left_out: of each particle that is not alive, why.
    """

    index: int
    fitness: tuple[float, ...]
    alive: tuple[bool, ...]
    total: int | None = None
    steps: tuple[int, ...] = ()
    done: float | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_particles(self) -> int:
        """P, the number of particles."""
        return len(self.fitness)

    @property
    def knows_progress(self) -> bool:
        """Whether ``progress`` may be asked for."""
        return self.done is not None or self.total is not None

    @property
    def progress(self) -> float:
        """From 0 before the first sync point to 1 at the last one. Must be known: see Rule.uses_progress."""
        if self.done is not None:
            return self.done
        assert self.total is not None
        return min(1.0, (self.index + 1) / self.total)

    @property
    def is_last(self) -> bool:
        """False also when nobody said how long training will be."""
        return self.knows_progress and self.progress >= 1

    def mean_weights(self) -> tuple[float, ...]:
        """Equal weights of the living particles, shape (P,); they sum to one."""
        share = 1.0 / sum(self.alive)
        return tuple(share if alive else 0.0 for alive in self.alive)

    def losses(self) -> list[float]:
        """Fitness with NaN, and whatever a dead particle reports, as the worst."""
        return [
            loss if alive and not math.isnan(loss) else math.inf
            for loss, alive in zip(self.fitness, self.alive, strict=True)
        ]

    def best_weights(self) -> tuple[float, ...]:
        """One for the living particle with the lowest loss, zero for the others, shape (P,)."""
        best = best_of(self.losses(), self.alive)
        return tuple(float(i == best) for i in range(self.num_particles))


def best_of(losses: Sequence[float], alive: Sequence[bool]) -> int:
    """Index of the living particle with the lowest loss; the lower index wins a tie."""
    # The dead come last even when nobody has a loss and all are equally bad.
    return min(range(len(losses)), key=lambda i: (not alive[i], losses[i], i))


@dataclass(frozen=True)
class Plan:
    """What to move, and the numbers the update needs. Equal on all ranks.

    Attributes:
        receive: a weighted mean over the particles; one particle's tensor each; the newest that a peer has sent;
            or nothing.
        weights: for ``"mean"``: shape (P,), sum one.
        sources: for ``"one"``: whose tensor each particle receives, shape (P,).
        send: ``"x"``, the shard itself, or the name of a state tensor.
        alive: shape (P,).
        factors: shape (P, k): numbers of each particle's update.
        lr_factors: shape (P,): each particle's learning rate is multiplied by its own; empty: as before.
        tentative: what is received may be thrown away in the end.
        score: score the new weights on the probe batch, and ask ``Rule.proceed``.
        carry: for ``Rule.proceed``.
        note: for ``metrics.jsonl``.
        memory: for the next sync point; the last plan's counts.
    """

    receive: Literal["mean", "one", "newest", "nothing"]
    weights: tuple[float, ...] = ()
    sources: tuple[int, ...] = ()
    send: str = "x"
    alive: tuple[bool, ...] = ()
    factors: tuple[tuple[float, ...], ...] = ()
    lr_factors: tuple[float, ...] = ()
    tentative: bool = False
    score: bool = False
    carry: Any = None
    note: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where an update happens.

    Attributes:
        particle: its number.
        parameter: name of the parameter that the elements belong to, if the rule is ``per_parameter``.
    """

    particle: int
    parameter: str = ""


class Rule(ABC):
    """One algorithm. Subclasses are registered in ``ds_pso.rules`` under their JSON name, or named in the JSON.

    Attributes:
        options: the validated options, an instance of ``Config``.
        seed: ``swarm.seed``, for random factors.
        Config: class of the options.
        model_in: what is exported: ``"x"``, the mean of the shards, or of the state tensor of this name.
        rough_state: state that may be kept in bf16: movements, not positions.
        memory_of_particles: what in ``Plan.memory`` is a list with an entry for each particle: it is cut or repeated
            where a checkpoint is loaded on another number of particles.
    """

    Config: ClassVar[type[RuleConfig]] = RuleConfig
    model_in: ClassVar[str] = "x"
    rough_state: ClassVar[frozenset[str]] = frozenset()
    memory_of_particles: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Any, seed: int = 0) -> None:
        self.options = options
        self.seed = seed

    @classmethod  # noqa: B027
    def complete(cls, section: MutableMapping[str, Any]) -> None:
        """Fill in keys of the ``swarm`` section that are left open, where the rule has other defaults.

        Args:
            section: as it was read: nothing in it has been checked yet.
        """

    @property
    def uses_fitness(self) -> bool:
        """Whether a first sync point without any loss is an error; later ones take the last losses again."""
        return False

    @property
    def uses_progress(self) -> bool:
        """Whether ``SyncPoint.progress`` must be known."""
        return False

    @property
    def uses_probe(self) -> bool:
        """Whether plans ask for a score, so that the script must give a probe."""
        return False

    @property
    def per_parameter(self) -> bool:
        """Whether ``update`` needs ``Place.parameter``, and so one call for each parameter."""
        return False

    @property
    def compares_rates(self) -> bool:
        """Whether it judges ``Plan.lr_factors`` by the losses of the whole interval after which they were set."""
        return False

    @property
    def ends_equal(self) -> bool:
        """Whether a sync point leaves all particles with the same weights: then those are what all know alike."""
        return False

    @property
    def receives_alike(self) -> bool:
        """Whether all particles receive the same, so that it may travel as a difference to what all know."""
        return self.max_staleness is None

    @property
    def max_staleness(self) -> int | None:
        """If not None, particles do not wait for each other: see ``Plan.receive`` = "newest".

        Nothing is taken that a peer sent when it had had this many sync points fewer, or still fewer. ``plan`` then
        knows the fitness and health of its own particle alone.
        """
        return None

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state that the rule keeps, empty when it keeps none.

        Args:
            x: a shard on which all particles agree.

        Returns:
            Tensors of the shape, dtype and device of ``x``, by name.
        """
        return {}

    @property
    def state_names(self) -> frozenset[str]:
        """Names of the tensors that it keeps."""
        return frozenset(self.init_state(torch.zeros(0)))

    @abstractmethod
    def plan(self, sync: SyncPoint, memory: Mapping[str, Any]) -> Plan:
        """Decide what to move. Called on every rank with equal arguments; at least one particle lives.

        Args:
            sync: what all know.
            memory: what the last plan said; empty at the first sync point.
        """

    def proceed(self, plan: Plan, scores: tuple[float, ...]) -> Plan:
        """The next plan of the same sync point, after one that asked for a score.

        Args:
            plan: that one.
            scores: loss of each particle's new weights on the probe batch, shape (P,); inf if not finite.
        """
        raise NotImplementedError

    def before_exchange(self, x: Tensor, state: State, plan: Plan, place: Place) -> None:  # noqa: B027
        """Bring ``state`` up to date before anything is sent. Elementwise, in place."""

    @abstractmethod
    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        """Move the shard with what came from the peers. Elementwise, in place.

        A particle that is not alive must come out with finite ``x`` and ``state``.

        Args:
            x: of any shape, fp32.
            received: like ``x``; ``x`` itself where the plan receives nothing.
            state: what ``init_state`` returned, piece by piece like ``x``; to be updated, too.
            plan: of this sync point.
            place: which particle, and which parameter if the rule asks for it.
        """
