"""gloo's exchanges in both directions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

_TAG = 0  # calls of a group follow each other


class FullDuplexGloo(dist.ProcessGroupGloo):
    """gloo with an all-to-all and an all-gather that post every receive before the first send.

    gloo sends what the receiver has asked for. In its own collectives that question may stand in the connection's
    queue behind all that is being sent, and then the two directions of a link take turns: on a slow one an exchange
    takes up to twice as long.
    """

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        *_: Any,
    ) -> _Works:
        """Send the parts of flat ``input`` to each rank, and receive those of ``output`` from each."""
        received, sent = output.split(list(output_split_sizes)), input.split(list(input_split_sizes))
        return self._swap(received, sent)

    def allgather(self, output_tensors: Sequence[Sequence[Tensor]], input_tensors: Sequence[Tensor], *_: Any) -> _Works:
        (rows,), (mine,) = output_tensors, input_tensors
        return self._swap(rows, [mine] * self.size())

    def _swap(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> _Works:
        group: Any = self
        me, size = self.rank(), self.size()
        received[me].copy_(sent[me])
        works = []
        for tensors, start in ((received, group.recv), (sent, group.send)):
            for i in range(1, size):
                peer = (me + i) % size
                if tensors[peer].numel():
                    works.append(start([tensors[peer]], peer, _TAG))
        return _Works(works)


@dataclass
class _Works:
    """Several works, waited for like one."""

    works: Sequence[Any]

    def wait(self, *timeout: timedelta) -> None:
        for work in self.works:
            work.wait(*timeout)
