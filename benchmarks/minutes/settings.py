"""What is compared: the rows, each a stack and an inner optimizer, and what all of them train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.slow_link.runs import Run as StackRun

MODEL = "llama:4x128"  # 0.88 million parameters
SEQ_LENGTH = 128
BATCH = 8  # sequences of a step at each end
NUM_ENDS = 2
VOCABULARY = 1024
TEXT = "python"  # see ``ds_pso.training.text.read_documents``
HELD_OUT = 512  # sequences on which rates are chosen, and as many others on which the page reports
SNAPSHOTS = 15  # of the weights, equally far apart in time, the last one at the end
BANDWIDTHS = {"100 Mbit/s": 1e8, "20 Mbit/s": 2e7}
ALONE = "one machine alone"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        stack: the stack, and how it is set; bandwidth and repetition mean nothing here.
        inner: optimizer of the steps.
        section: more keys of ``swarm``.
    """

    name: str
    stack: StackRun
    inner: Literal["AdamW", "Muon"] = "AdamW"
    section: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bandwidths(self) -> list[str]:
        """Links over which it is run; one without a name for a machine alone."""
        return list(BANDWIDTHS) if self.stack.talks else [""]


def _sparse(residual: str) -> dict[str, Any]:
    return {"residual": residual, "sparse": {"density": 1 / 64}}


_ZERO_1 = StackRun("DeepSpeed", stage=1, interval=1, wire="bf16")
_INT4 = StackRun("ds_pso", stage=0, interval=4, wire="int4", delay=1)


def _sparse_run(interval: int) -> StackRun:
    return StackRun("ds_pso", stage=0, interval=interval, wire="sparse")


ROWS = [
    Row(ALONE, StackRun("torch", talks=False)),
    Row("DeepSpeed ZeRO 1, bf16 gradients", _ZERO_1),
    Row("DDP, fp16 hook", StackRun("DDP", interval=1, wire="fp16")),
    Row("DDP, PowerSGD rank 4", StackRun("DDP", interval=1, wire="PowerSGD")),
    Row("DeepSpeed ZeRO 1, accumulation 8", StackRun("DeepSpeed", "accumulation", stage=1, interval=8)),
    Row("torchft DiLoCo, n = 32, d = 4, 4 fragments", StackRun("torchft", "diloco", delay=4, fragments=4)),
    Row("torchft DiLoCo, n = 8, d = 1, 4 fragments", StackRun("torchft", "diloco", interval=8, delay=1, fragments=4)),
    Row("ds_pso int4, n = 4, d = 1", _INT4),
    Row("ds_pso sparse, n = 1", _sparse_run(1), section=_sparse("weights")),
    Row("ds_pso sparse, n = 2", _sparse_run(2), section=_sparse("wire")),
    Row("ds_pso sparse, n = 4", _sparse_run(4), section=_sparse("wire")),
    Row("ds_pso Muon, int4, n = 4, d = 1", _INT4, "Muon"),
    Row("ds_pso Muon, sparse, n = 1", _sparse_run(1), "Muon", _sparse("weights")),
    # What Muon alone is worth, without ds_pso.
    Row(f"{ALONE}, Muon", StackRun("DeepSpeed", stage=0, talks=False), "Muon"),
    Row("DeepSpeed ZeRO 1, bf16 gradients, Muon", _ZERO_1, "Muon"),
]
BY_NAME = {row.name: row for row in ROWS}
