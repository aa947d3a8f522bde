"""Experts of DeepSpeed's MoE layers: which of them lie on this rank, and what they are called in the whole model.

Under expert parallelism each of E ranks holds N / E of a layer's N experts, in a list that counts from 0 on every rank.
In the whole model, as in DeepSpeed's checkpoints, expert j of the e-th rank has the number e N / E + j: the one that
it has where E is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class WholeParameter:
    """A parameter of the particle's model, which may lie on other ranks.

    Attributes:
        name: in the whole model.
        like: the parameter. If it belongs to an expert of other ranks, that of the expert here with its place.
        is_here: whether ``like`` is the parameter itself.
    """

    name: str
    like: nn.Parameter
    is_here: bool = True


@dataclass(frozen=True)
class _Stack:
    """The experts of one layer that lie on this rank.

    Attributes:
        first: number of the first one in the whole layer.
        total: number of experts in the whole layer.
    """

    name: str
    experts: nn.ModuleList
    first: int
    total: int

    def whole(self) -> Iterator[WholeParameter]:
        """Yield the parameters of all experts of the layer."""
        here = len(self.experts)
        for number in range(self.total):
            is_here = self.first <= number < self.first + here
            for name, parameter in self.experts[number % here].named_parameters():
                yield WholeParameter(f"{self.name}.{number}.{name}", parameter, is_here)


def whole_parameters(module: nn.Module) -> list[WholeParameter]:
    """Return the parameters of the particle's model, in the order that they have in a module with all experts.

    Names, shapes and order are equal on all ranks. Shared parameters count once.
    """
    stacks = {id(parameter): stack for stack in _stacks(module) for parameter in stack.experts.parameters()}
    found: list[WholeParameter] = []
    done: set[str] = set()
    for name, parameter in module.named_parameters():
        stack = stacks.get(id(parameter))
        if stack is None:
            found.append(WholeParameter(name, parameter))
        elif stack.name not in done:
            done.add(stack.name)
            found += stack.whole()
    return found


def replicas_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the group of the ranks that hold the same expert; None: all ranks of the particle hold the parameter."""
    group_name = _group_name(parameter)
    if group_name is None:
        return None
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(group_name)


def why_not_whole(module: nn.Module, stage: int) -> str | None:
    """Return what keeps experts on several ranks from being one model, with a remedy; None: nothing.

    Args:
        stage: of ZeRO.
    """
    for stack in _stacks(module):
        if stack.total == len(stack.experts):
            continue
        parameters = dict(stack.experts.named_parameters(remove_duplicate=False))
        for name in stack.experts.state_dict().keys() - parameters.keys():
            return (
                f"its experts have buffers ({stack.name}.{name}), of which DeepSpeed gathers none from the ranks of "
                "expert parallelism; keep them outside the experts, or set ep_size to 1"
            )
        if stage > 1 and not all(parameter.requires_grad for parameter in stack.experts.parameters()):
            return (
                f"experts of {stack.name} are not trained, and at ZeRO 2 DeepSpeed loads those of rank 0 on all ranks; "
                "use ZeRO 1, train them, or set ep_size to 1"
            )
    return None


def _stacks(module: nn.Module) -> Iterator[_Stack]:
    for name, part in module.named_modules():
        if not name.endswith("deepspeed_experts") or not isinstance(part, nn.ModuleList):
            continue
        rank, size = 0, 1
        group_name = next(filter(None, map(_group_name, part.parameters())), None)
        if group_name is not None:
            from deepspeed.utils import groups

            rank = groups._get_expert_parallel_rank(group_name)
            size = groups._get_expert_parallel_world_size(group_name)
        yield _Stack(name, part, rank * len(part), size * len(part))


def _group_name(parameter: Tensor) -> str | None:
    """Return DeepSpeed's name for the ranks over which an expert's layer is spread; None if all hold the same."""
    if getattr(parameter, "allreduce", True):  # DeepSpeed's mark of an expert
        return None
    from deepspeed.utils import groups

    name: str = parameter.group_name  # type: ignore[attr-defined]
    return name if groups._get_expert_parallel_world_size(name) > 1 else None
