"""The state of the optimizer that DeepSpeed wraps: how it begins anew, and what of it is a moment.

Knows optimizers by what all of them have; must not know ZeRO stages or peers.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

# Sums of gradients, of their squares or sizes: a mean over particles is one, too. Not so a step size, or a copy of
# weights, which a sync has just changed.
_MOMENTS = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_slow", "momentum_buffer", "square_avg"}
    | {"grad_avg", "acc_delta", "sum", "variance"}
)
MUON_MOMENTUM = "momentum_buffer"
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})  # sums of squares: second moments
# Moments that may be averaged at periods of their own, and rounded; of the others, some must fit to one another (the
# mean and the mean square in a centred RMSprop), or to the weights.
MOMENTS_OF_KIND = {"first": frozenset({"exp_avg", "momentum_buffer"}), "second": _SQUARES}
# A schedule's, or the script's: a new optimizer would get them, too.
_SCHEDULED = frozenset(("params", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "betas", "momentum"))
_MODE = "train_mode"  # schedule-free: whether the weights are those that train, or those to evaluate
_ITERATE = "z"  # schedule-free: the weights are an average of it, so that means of both belong together
_STEP = "step"


class _Optimizer(Protocol):
    """The attributes that optimizers and DeepSpeed's wrappers of them have."""

    state: MutableMapping[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class _Value:
    """A value in the state of an optimizer that has not taken a step.

    Attributes:
        value: of a tensor that is the same everywhere, that number; of one that copies the weights, None.
        dtype: None: no tensor.
    """

    value: Any
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, found: object, master: object) -> _Value:
        if not isinstance(found, Tensor):
            return cls(copy.deepcopy(found))
        flat = found.detach().reshape(-1)
        if flat.numel() == 0 or bool((flat == flat[0]).all()):
            return cls(flat[0].item() if flat.numel() else 0, found.dtype)
        if isinstance(master, Tensor) and found.shape == master.shape and torch.equal(found, master.to(found)):
            return cls(None, found.dtype)
        return cls(found.detach().clone(), found.dtype)

    def put_into(self, found: object, master: object) -> object:
        """Return the value again: in the tensor ``found``, to which DeepSpeed may have references."""
        if self.dtype is None or not isinstance(found, Tensor):
            return copy.deepcopy(self.value)
        value: Any = master if self.value is None else self.value
        found.detach().copy_(torch.as_tensor(value).detach())
        return found


class OptimizerState:
    """The state of an optimizer, and as what it began.

    Args:
        optimizer: DeepSpeed's, or the one that trains where there is no other.
        has_stepped: whether its state is that of a training, so that it is not known what it began as.
    """

    def __init__(self, optimizer: _Optimizer, *, has_stepped: bool = False) -> None:
        self._optimizer = optimizer
        # A schedule-free optimizer's train(), called before DeepSpeed has put masters in the place of the parameters,
        # leaves empty entries for these, which nobody could save.
        for parameter in [parameter for parameter, state in optimizer.state.items() if not state]:
            del optimizer.state[parameter]
        # Most optimizers make their state in their first step, when it is missing, and need none to begin anew (and
        # DeepSpeed's wrappers for half precision take a step without gradients). Some make it when they are made.
        self._made = {
            master: {name: _Value.of(value, master) for name, value in state.items()}
            for master, state in optimizer.state.items()
            if state and not has_stepped and not state.get(_STEP, 0) > 0
        }
        self._counts_in_groups = any(_STEP in group for group in optimizer.param_groups)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that is wrapped, or that is there alone."""
        return cast(torch.optim.Optimizer, getattr(self._optimizer, "optimizer", self._optimizer))

    def reset(self) -> None:
        """Let the optimizer go on as a new one would from the weights as they are."""
        state = self._optimizer.state
        before = {master: state.get(master, {}) for master in self._made}
        state.clear()
        for master, made in self._made.items():
            old = before[master]
            state[master] = {name: value.put_into(old.get(name), master) for name, value in made.items()}
        own = self._own_options()
        for group in self._optimizer.param_groups:
            group.update(copy.deepcopy({name: value for name, value in own.items() if name in group}))
            if self._counts_in_groups:
                group[_STEP] = 0
            else:
                group.pop(_STEP, None)

    def _own_options(self) -> dict[str, Any]:
        """Return what the optimizer itself changes in its groups, as it begins: no argument of its constructor."""
        arguments = inspect.signature(type(self.inner).__init__).parameters
        return {
            name: value
            for name, value in getattr(self.inner, "defaults", {}).items()
            if name not in arguments and name not in _SCHEDULED and name not in (_MODE, _STEP)
        }

    @property
    def is_schedule_free(self) -> bool:
        """True if the weights that train and those to evaluate differ, and the optimizer turns one into the other."""
        return any(_MODE in group for group in self._optimizer.param_groups)

    @property
    def is_in_eval_mode(self) -> bool:
        """True if the weights are those to evaluate, which are no place to train on from."""
        groups = self._optimizer.param_groups
        has_stepped = any(self._optimizer.state.values())
        return has_stepped and any(group.get(_MODE) is False for group in groups)

    @contextlib.contextmanager
    def evaluating(self, masters: Sequence[Tensor]) -> Iterator[None]:
        """In the block the masters are the weights to evaluate; at its end they are what they were, bit for bit."""
        inner: Any = self.inner
        if not self.is_schedule_free or self.is_in_eval_mode:
            yield
            return
        own = [master.detach().clone() for master in masters]
        inner.eval()
        try:
            yield
        finally:
            inner.train()
            for master, values in zip(masters, own, strict=True):
                master.detach().copy_(values)

    def moments_of(self, master: Tensor) -> dict[str, Tensor]:
        """Return the moments of a master by name, flat and live, in the order of their names."""
        state = self._optimizer.state.get(master, {})
        return {name: state[name].view(-1) for name in sorted(state) if self._is_moment(name, state[name], master)}

    def decays(self, group: Mapping[str, Any], names: Collection[str]) -> dict[str, float]:
        """Return by what a step multiplies moments, as far as that is known.

        Args:
            group: of the optimizer, with its options.
            names: of the moments of one of its masters.
        """
        found = {"sum": 1.0, "max_exp_avg_sq": 1.0}  # of Adagrad, and the largest so far
        if "betas" in group:
            first, second = map(float, group["betas"][:2])
            # Lion has one moment, to which its second beta belongs; the first is for the step alone.
            found |= {"exp_avg": first if "exp_avg_sq" in names else second, "exp_avg_sq": second}
        if "momentum" in group:
            found[MUON_MOMENTUM] = float(group["momentum"])
        if "alpha" in group:
            found["square_avg"] = float(group["alpha"])
        return found

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The optimizer's groups, with their options."""
        return self._optimizer.param_groups

    def without_mean(self) -> Iterator[str]:
        """Yield the names of state that has as many elements as weights, or is packed, and is no moment."""
        for master, state in self._optimizer.state.items():
            for name, value in state.items():
                several = value.dim() > 0 if isinstance(value, Tensor) else isinstance(value, list | tuple | dict)
                if several and not self._is_moment(name, value, master):
                    yield name

    def _is_moment(self, name: str, value: object, master: object) -> bool:
        known = name in _MOMENTS or (name == _ITERATE and self.is_schedule_free)
        return known and _is_like(name, value, master)


def _is_like(name: str, value: object, master: object) -> bool:
    """Return true if the value has numbers for all elements of the master, as they are: not packed into fewer bits."""
    if not isinstance(value, Tensor) or not isinstance(master, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return False
    # At ZeRO 1 and 2 Muon needs whole matrices: its momentum is that of all of which the rank has a part.
    of_whole_matrices = name == MUON_MOMENTUM and value.dim() == master.dim() == 1
    return value.is_floating_point() and (value.shape == master.shape or of_whole_matrices)
