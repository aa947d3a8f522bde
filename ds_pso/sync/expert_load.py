"""Expert load: how often the routers of a mixture of experts choose each expert, and how far particles differ in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

_Count = Callable[[Sequence[Tensor], int], Tensor | None]  # of what a router returns, and its number of experts


class ExpertLoad:
    """Counts the tokens that go to each expert in training, by forward hooks on the routers.

    Routers are those of ``deepspeed.moe.layer.MoE``, and of models of transformers' that return the chosen experts
    beside the logits. Where activations are recomputed tokens count twice, which leaves their shares as they are.
    Counting does not wait for the device.

    Attributes:
        sizes: number of experts of each router.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sizes: list[int] = []
        self._counts: list[Tensor | None] = []
        for router, num_experts, count in _routers(module):
            self._counts.append(None)
            router.register_forward_hook(self._hook(len(self.sizes), count))
            self.sizes.append(num_experts)

    def _hook(self, number: int, count: _Count) -> Callable[..., None]:
        def saw(router: nn.Module, _: object, output: Sequence[Tensor]) -> None:
            chosen = count(output, self.sizes[number]) if router.training else None
            if chosen is not None:
                before = self._counts[number]
                self._counts[number] = chosen if before is None else before + chosen

        return saw

    def take(self) -> list[float]:
        """Return the tokens that went to each expert since this was last called, router by router."""
        found: list[float] = []
        for number, size in enumerate(self.sizes):
            counts, self._counts[number] = self._counts[number], None
            found += [0.0] * size if counts is None else counts.tolist()
        return found

    def distances(self, table: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Return how far each particle's load is from the mean of all.

        Of one router, with p_i(e) the share of particle i's tokens that go to expert e, it is the total variation

            1/2 sum_e |p_i(e) - mean_j p_j(e)|,

        0 if all choose alike, and 1 - 1/P at most. Over the routers the mean is taken.

        Args:
            table: what ``take`` has returned, by particle; NaN stand for one that is absent.

        Returns:
            Shape (P,); NaN of a particle that is absent, or of which a router has seen no token.
        """
        total = [0.0] * len(table)
        start = 0
        for size in self.sizes:
            shares = [_shares(row[start : start + size]) for row in table]
            known = [share for share in shares if share is not None]
            mean = [sum(column) / len(known) for column in zip(*known, strict=True)]
            for particle, share in enumerate(shares):
                apart = math.nan if share is None else sum(abs(p - q) for p, q in zip(share, mean, strict=True)) / 2
                total[particle] += apart
            start += size
        return tuple(value / len(self.sizes) for value in total)


def _shares(counts: Sequence[float]) -> list[float] | None:
    total = sum(counts)
    return [count / total for count in counts] if total > 0 else None


def _routers(module: nn.Module) -> Iterator[tuple[nn.Module, int, _Count]]:
    """Yield the routers, the number of experts of each, and what counts the tokens of each expert in its output."""
    classes = tuple(_router_classes(module))
    for part in module.modules():
        layer = part._modules.get("deepspeed_moe")  # not an attribute: wrappers have those of what they wrap
        if layer is not None:
            yield layer.gate, part.num_experts, _counted  # type: ignore[misc]
        elif isinstance(part, classes) and isinstance(getattr(part, "num_experts", None), int):
            yield part, part.num_experts, _chosen  # type: ignore[misc]


def _router_classes(module: nn.Module) -> Iterator[type[nn.Module]]:
    """Yield the classes of which a model of transformers' says that they return the logits of its routers."""
    for part in module.modules():
        recorders = getattr(part, "can_record_outputs", None)
        found = recorders.get("router_logits", ()) if isinstance(recorders, dict) else ()
        for recorder in found if isinstance(found, Iterable) else [found]:
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                yield kind


def _counted(output: Sequence[Tensor], num_experts: int) -> Tensor | None:
    """DeepSpeed's gate returns the counts last, before tokens are dropped."""
    return output[-1].detach().to(torch.int64)


def _chosen(output: Sequence[Tensor], num_experts: int) -> Tensor | None:
    """Routers of transformers' return logits, weights, and the indices of the chosen experts, shape (tokens, k)."""
    if not isinstance(output, tuple) or len(output) < 3 or output[2].dtype != torch.int64:
        return None
    chosen = output[2].detach().reshape(-1)
    return chosen.new_zeros(num_experts).index_add_(0, chosen, torch.ones_like(chosen))  # bincount waits for the device
