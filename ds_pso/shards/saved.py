"""The state that an optimizer class has saved, read by what it means instead of by that class's keys.

Knows tensors and dictionaries; needs no engine and no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypedDict, cast

from torch import Tensor

from ds_pso.shards.base import equal_parts


class BaseState(TypedDict):
    """``state_dict()`` of the torch optimizer that DeepSpeed's wraps; its "params" are numbers of masters."""

    state: dict[int, dict[str, object]]
    param_groups: list[dict[str, object]]


class SavedOptimizer(Protocol):
    """One ``optimizer.state_dict()``.

    Attributes:
        values: the state itself; changes that are made go into it.
    """

    values: dict[str, object]

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the flat fp32 masters of one of ``size`` ranks, as the live ``Shards.tensors``.

        Padding at their end may be missing.

        Args:
            parameters: the particle's trained parameters in the optimizer's order, for those that are their own
                masters.
        """


@dataclass(frozen=True)
class SavedForm:
    """The form in which one optimizer class saves its state. Stands beside its ``Shards``, so that nothing else knows.

    Attributes:
        recognizes: a state by its keys: true for this form, and for no other.
        read: makes a ``SavedOptimizer`` of it.
    """

    recognizes: Callable[[Mapping[str, object]], bool]
    read: Callable[[dict[str, object]], SavedOptimizer]


@dataclass
class SavedPartition:
    """The part of one rank, as all ZeRO optimizers save it.

    Attributes:
        masters_key: where the flat masters of this rank are.
        base_key: where the state of the wrapped optimizer is.
        common: keys of what is the particle's, and so is not divided anew when the number of ranks changes.
    """

    values: dict[str, object]
    masters_key: str
    base_key: str
    common: ClassVar[Sequence[str]] = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")

    @property
    def masters(self) -> list[Tensor]:
        """The masters, live."""
        return cast("list[Tensor]", self.values[self.masters_key])

    @masters.setter
    def masters(self, tensors: list[Tensor]) -> None:
        self.values[self.masters_key] = tensors

    @property
    def base(self) -> BaseState:
        """The state of the wrapped optimizer, live."""
        return cast(BaseState, self.values[self.base_key])

    @property
    def is_merged(self) -> bool:
        """True if the parts of all ranks were made one, so that ``base`` has a form of its own."""
        return isinstance(self.values[self.base_key], list)

    def masters_in_group(self, group: int) -> list[int]:
        """Return the numbers of the masters in a parameter group."""
        return cast("list[int]", self.base["param_groups"][group]["params"])

    def group_of(self, master: int) -> int:
        """Return the number of the parameter group that a master belongs to."""
        groups = range(len(self.base["param_groups"]))
        return next(group for group in groups if master in self.masters_in_group(group))

    def padded_numel(self, shard: int) -> int:
        """Return the length of a master with the padding that it had in memory."""
        paddings = cast("list[int] | None", self.values.get("group_paddings"))
        return self.masters[shard].numel() + (paddings[shard] if paddings else 0)

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [master.detach() for master in self.masters]


@dataclass
class SavedWhole:
    """The state of a particle at ZeRO 0, of which each rank exchanges an equal part.

    Attributes:
        find_masters: the masters of the whole model, from the state and the parameters.
    """

    values: dict[str, object]
    find_masters: Callable[[dict[str, object], Sequence[Tensor]], Sequence[Tensor]]

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        masters = self.find_masters(self.values, parameters)
        part = equal_parts([master.numel() for master in masters], size)[rank]
        return [masters[m].detach().view(-1)[start:stop] for m, start, stop in part]
