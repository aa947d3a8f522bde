"""The interface of a sync rule: a plan made from fitness alone, and an elementwise update of a shard.

A rule never communicates. It says what it needs from its peers (``Plan.receive``) and the
exchange moves just that. All methods are pure: what must survive from one sync point to the
next lies in ``state`` (tensors like the shard) and in ``memory`` (JSON values, equal on all ranks),
so the same rule runs under ZeRO, in a simulation of many particles, and in a unit test.

Rules use the methods of the tensors they are given and import no torch themselves, so that a command
that only reads a config starts at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from ds_pso.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

State = MutableMapping[str, "Tensor"]  # name -> tensor of the shape, dtype and device of the shard
StateInit = Callable[["Tensor"], "Tensor"]  # a shard on which all particles agree -> the state tensor at the beginning
RuleMemory = Mapping[str, Any]  # JSON values of the rule's own choice


def copy_of(x: Tensor) -> Tensor:
    """Return a copy of the shard, for a state tensor to begin with."""
    return x.detach().clone()


def zeros_like(x: Tensor) -> Tensor:
    """Return zeros like the shard, for a state tensor to begin with."""
    return x.new_zeros(x.shape)


class RuleConfig(StrictModel):
    """Options of a rule: the subsection of ``swarm`` that has the rule's name."""


@dataclass(frozen=True)
class SyncPoint:
    """A sync point as every rank of every particle sees it, with the same numbers everywhere.

    Attributes:
        index: how many sync points came before.
        fitness: loss of each particle, shape (P,); lower is better.
        alive: shape (P,); false: loss or weights are not finite, or far above those of the others.
        total: sync points of the whole training; None: unknown.
        steps: optimizer steps of each particle since the last sync point, shape (P,).
        done: part of the training that is over; None: computed from ``index`` and ``total``.
        left_out: why each particle that is not alive was left out, by its number.
        samples: that each particle has trained on since the last sync point, shape (P,); empty or all zero: all count
            alike.
    """

    index: int
    fitness: tuple[float, ...]
    alive: tuple[bool, ...]
    total: int | None = None
    steps: tuple[int, ...] = ()
    done: float | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    samples: tuple[int, ...] = ()

    @property
    def num_particles(self) -> int:
        """P, the number of particles."""
        return len(self.fitness)

    @property
    def knows_progress(self) -> bool:
        """True if the length of the training is known, so that ``progress`` may be used."""
        return self.done is not None or self.total is not None

    @property
    def progress(self) -> float:
        """Part of the training that is over, from 0 to 1 at the last sync point. See ``Rule.uses_progress``."""
        if self.done is not None:
            return self.done
        assert self.total is not None
        return min(1.0, (self.index + 1) / self.total)

    @property
    def is_last(self) -> bool:
        """True at the last sync point of the training; false if the length is not known."""
        return self.knows_progress and self.progress >= 1

    def mean_weights(self) -> tuple[float, ...]:
        """Return the weights of the particles in a mean, shape (P,); they sum to one.

        In proportion to the samples of each; zero for those that are not alive.
        """
        counts = self.samples or (0,) * self.num_particles
        living = [count if alive else 0 for count, alive in zip(counts, self.alive, strict=True)]
        if not any(living):
            living = [int(alive) for alive in self.alive]
        total = sum(living)
        return tuple(count / total for count in living)

    def losses(self) -> list[float]:
        """Return the fitness with infinity, the worst, for NaN and for particles that are not alive; shape (P,)."""
        return [
            loss if alive and not math.isnan(loss) else math.inf
            for loss, alive in zip(self.fitness, self.alive, strict=True)
        ]

    def best_weights(self) -> tuple[float, ...]:
        """Return one for the living particle with the lowest loss and zero for the others, shape (P,)."""
        best = best_of(self.losses(), self.alive)
        return tuple(float(i == best) for i in range(self.num_particles))


def best_of(losses: Sequence[float], alive: Sequence[bool]) -> int:
    """Return the index of the living particle with the lowest loss; the lower index wins a tie."""
    # The dead come last even when nobody has a loss and all are equally bad.
    return min(range(len(losses)), key=lambda i: (not alive[i], losses[i], i))


@dataclass(frozen=True)
class Plan:
    """A rule's decision at a sync point: the tensors to move, and the numbers of the update. Equal on all ranks.

    Attributes:
        receive: a weighted mean over the particles; one particle's tensor each; the newest that a peer has sent;
            or nothing.
        weights: for ``"mean"``: shape (P,), sum one.
        sources: for ``"one"``: the particle whose tensor each particle receives, shape (P,).
        send: ``"x"``, the shard itself, or the name of a state tensor.
        alive: shape (P,).
        factors: shape (P, k): numbers of each particle's update.
        lr_factors: shape (P,): each particle's learning rate is multiplied by its own; empty: as before.
        tentative: what is received may be thrown away in the end.
        score: score the new weights on the probe batch, and ask ``Rule.proceed``.
        carry: anything, for ``Rule.proceed`` and ``Rule.update``.
        note: values for ``metrics.jsonl``.
        memory: values for the next sync point; those of the last plan are used.
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
    carry: object = None
    note: Mapping[str, object] = field(default_factory=dict)
    memory: RuleMemory = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The particle, and the parameter, that an update is about.

    Attributes:
        particle: number of the particle.
        parameter: name of the parameter that the elements belong to, if the rule is ``per_parameter``.
    """

    particle: int
    parameter: str = ""


class Rule(ABC):
    """One algorithm. Subclasses are registered in ``ds_pso.rules`` under their JSON name, or named in the JSON.

    Attributes:
        options: the validated options, an instance of ``Config``; a subclass annotates it with that class.
        seed: ``swarm.seed``, for random factors.
        Config: class of the options.
        model_in: the tensor whose mean over the particles is exported: ``"x"``, the shard, or the name of a state
            tensor.
        rough_state: state tensors that may be kept in bf16: movements, not positions.
        memory_of_particles: names in ``Plan.memory`` whose values are lists with an entry for each particle: they are
            cut or repeated where a checkpoint is loaded on another number of particles.
    """

    Config: ClassVar[type[RuleConfig]] = RuleConfig
    model_in: ClassVar[str] = "x"
    rough_state: ClassVar[frozenset[str]] = frozenset()
    memory_of_particles: ClassVar[frozenset[str]] = frozenset()

    options: RuleConfig

    def __init__(self, options: RuleConfig, seed: int = 0) -> None:
        self.options = options
        self.seed = seed

    def inside(self, optimizer: str) -> Rule:
        """Return the rule for particles that such an optimizer trains, named by its class."""
        return self

    @property
    def uses_fitness(self) -> bool:
        """True if plans depend on losses: a first sync point without any is an error; later ones reuse the last."""
        return False

    @property
    def uses_progress(self) -> bool:
        """True if plans need ``SyncPoint.progress``, and so the length of the training."""
        return False

    @property
    def uses_probe(self) -> bool:
        """True if plans ask for a score, so that the script must give a probe."""
        return False

    @property
    def per_parameter(self) -> bool:
        """True if ``update`` needs ``Place.parameter``, and so one call for each parameter."""
        return False

    @property
    def compares_rates(self) -> bool:
        """True if the losses of a whole interval serve to compare the ``Plan.lr_factors`` that held in it."""
        return False

    @property
    def ends_equal(self) -> bool:
        """True if a sync point leaves all particles with the same weights."""
        return False

    @property
    def acts_alone(self) -> bool:
        """True if there are sync points without peers, too: ``update`` of one particle, whose own tensor arrives.

        By other rules one particle is plain DeepSpeed. Of no use with ``max_staleness``.
        """
        return False

    @property
    def receives_alike(self) -> bool:
        """True if all particles receive the same tensor, so that it may travel as a difference to a common state."""
        return self.max_staleness is None

    @property
    def receives_the_mean(self) -> bool:
        """True if all that particles ever receive is the mean of the shards."""
        return False

    @property
    def keeps_lengths_from(self) -> str | None:
        """Name of the state tensor from which the particles moved, if a mean shall be as long as the movements are.

        None: a plain mean, which is shorter. See ``ds_pso.sync.direction_mean``.
        """
        return None

    @property
    def max_staleness(self) -> int | None:
        """If not None, particles do not wait for each other: see ``Plan.receive`` = "newest".

        A tensor that a peer sent when it was this many sync points behind, or more, is ignored. ``plan`` then
        knows the fitness and health of its own particle alone.
        """
        return None

    @property
    def initial_state(self) -> Mapping[str, StateInit]:
        """State tensors by name, each with the function that makes it: ``copy_of``, ``zeros_like`` or your own."""
        return {}

    @final
    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """Make the state tensors of a shard: see ``initial_state``.

        Args:
            x: a shard on which all particles agree.

        Returns:
            Tensors of the shape, dtype and device of ``x``, by name.
        """
        return {name: make(x) for name, make in self.initial_state.items()}

    @final
    @property
    def state_names(self) -> frozenset[str]:
        """Names of the state tensors."""
        return frozenset(self.initial_state)

    @abstractmethod
    def plan(self, sync: SyncPoint, memory: RuleMemory) -> Plan:
        """Decide what to move. Called on every rank with equal arguments; at least one particle lives.

        Args:
            sync: the sync point.
            memory: ``Plan.memory`` of the last plan; empty at the first sync point.
        """

    def proceed(self, plan: Plan, scores: tuple[float, ...]) -> Plan:
        """Return the next plan of the same sync point, after one that asked for a score.

        Args:
            plan: the plan that asked.
            scores: loss of each particle's new weights on the probe batch, shape (P,); inf if not finite.
        """
        raise NotImplementedError

    def before_exchange(self, x: Tensor, state: State, plan: Plan, place: Place) -> None:  # noqa: B027
        """Update ``state`` before anything is sent. Elementwise, in place."""

    @abstractmethod
    def update(self, x: Tensor, received: Tensor, state: State, plan: Plan, place: Place) -> None:
        """Move the shard by the tensor that came from the peers. Elementwise, in place.

        A particle that is not alive must come out with finite ``x`` and ``state``.

        Args:
            x: the shard or a piece of it, of any shape, fp32.
            received: like ``x``; ``x`` itself where the plan receives nothing.
            state: state tensors, cut like ``x``; to be updated, too.
            plan: the plan of this sync point.
            place: the particle, and the parameter if the rule is ``per_parameter``.
        """
