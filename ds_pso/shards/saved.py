"""The state that an optimizer class has saved, read by what it means instead of by that class's keys.

Knows tensors and dictionaries; needs no engine and no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, cast

from torch import Tensor

from ds_pso.shards.base import equal_parts

_LOSS_SCALE = "loss_scaler"
# The particle's in the state of a ZeRO optimizer, and so not divided anew when the number of ranks changes.
_COMMON = (_LOSS_SCALE, "dynamic_loss_scale", "overflow", "clip_grad")


class SavedOptimizer(Protocol):
    """One ``optimizer.state_dict()``, as a rank reads it."""

    @property
    def values(self) -> dict[str, object]:
        """The state itself, live."""

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the flat fp32 masters of one of ``size`` ranks, as the live ``Shards.tensors``.

        Padding at their end may be missing.

        Args:
            parameters: the particle's trained parameters in the optimizer's order, for those that are their own
                masters.
        """


class SavedFormat(Protocol):
    """The description of what an optimizer class saves: which keys are its own, and what is behind them."""

    def recognizes(self, values: Mapping[str, object]) -> bool:
        """Return True if an optimizer of this class has saved ``values``, and none of another."""

    def read(self, values: dict[str, object]) -> SavedOptimizer:
        """Return the state with a name for everything in it."""


# -- ZeRO 1 to 3: each rank saves its part -----------------------------------------------------------


class BaseState(TypedDict):
    """``state_dict()`` of the torch optimizer that DeepSpeed's wraps; its "params" are numbers of masters."""

    state: dict[int, dict[str, object]]
    param_groups: list[dict[str, object]]


@dataclass(frozen=True)
class PartitionFormat:
    """The keys of a ZeRO optimizer.

    Attributes:
        masters: of the flat masters of the rank.
        base: of the state of the wrapped optimizer.
        has_loss_scale: tells apart classes that use the same keys.
    """

    masters: str
    base: str
    has_loss_scale: bool = True

    def recognizes(self, values: Mapping[str, object]) -> bool:
        return self.masters in values and (_LOSS_SCALE in values) == self.has_loss_scale

    def read(self, values: dict[str, object]) -> SavedPartition:
        return SavedPartition(values, self)


@dataclass(frozen=True)
class SavedPartition:
    """The part of one rank of a ZeRO optimizer. Changes go into ``values``."""

    values: dict[str, object]
    format: PartitionFormat

    @property
    def masters(self) -> list[Tensor]:
        """The flat masters, live."""
        return cast("list[Tensor]", self.values[self.format.masters])

    @property
    def base(self) -> BaseState:
        """The state of the wrapped optimizer, live."""
        return cast(BaseState, self.values[self.format.base])

    @property
    def is_merged(self) -> bool:
        """True if the parts of all ranks were made one, so that ``base`` has a form of its own."""
        return isinstance(self.values[self.format.base], list)

    def replace_masters(self, masters: list[Tensor]) -> None:
        """Put these in place of ``masters``."""
        self.values[self.format.masters] = masters

    def copy_common(self, other: SavedPartition) -> None:
        """Take over from another rank what is the particle's."""
        self.values.update({name: other.values[name] for name in _COMMON if name in other.values})

    def masters_in_group(self, group: int) -> list[int]:
        """Return the numbers of the masters in a parameter group."""
        return cast("list[int]", self.base["param_groups"][group]["params"])

    def group_of(self, master: int) -> int:
        """Return the number of the parameter group that a master belongs to."""
        groups = range(len(self.base["param_groups"]))
        return next(group for group in groups if master in self.masters_in_group(group))

    def padded_numel(self, master: int) -> int:
        """Return the length of a master with the padding that it had in memory."""
        paddings = cast("list[int] | None", self.values.get("group_paddings"))
        return self.masters[master].numel() + (paddings[master] if paddings else 0)

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [master.detach() for master in self.masters]


# -- ZeRO 0: one state of the whole particle ---------------------------------------------------------


@dataclass(frozen=True)
class WholeFormat:
    """The key of an optimizer that is not divided.

    Attributes:
        masters: of its masters, or of lists of them; None: the parameters are the masters.
    """

    masters: str | None

    def recognizes(self, values: Mapping[str, object]) -> bool:
        return ("param_groups" if self.masters is None else self.masters) in values

    def read(self, values: dict[str, object]) -> SavedWhole:
        return SavedWhole(values, self)


@dataclass(frozen=True)
class SavedWhole:
    """The state of all ranks of a particle, each of which exchanges an equal part."""

    values: dict[str, object]
    format: WholeFormat

    def masters(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the masters of the whole model; see ``shards`` for ``parameters``."""
        if self.format.masters is None:
            return parameters
        groups = cast("list[Tensor | list[Tensor]]", self.values[self.format.masters])
        return [master for group in groups for master in (group if isinstance(group, list) else [group])]

    def shards(self, rank: int, size: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        masters = self.masters(parameters)
        part = equal_parts([master.numel() for master in masters], size)[rank]
        return [masters[m].detach().view(-1)[start:stop] for m, start, stop in part]
