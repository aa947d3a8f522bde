"""Which runs the table consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MICRO_BATCH, SEQ_LENGTH = 4, 128  # 512 tokens a step at each end
BANDWIDTHS = {"1 Gbit/s": 1e9, "100 Mbit/s": 1e8, "20 Mbit/s": 2e7}


@dataclass(frozen=True)
class Run:
    """One run of one stack. The defaults are what most have."""

    stack: str  # "DeepSpeed", "DDP", "ds_pso", "torchft", "Accelerate"; "torch" without a peer
    rule: str = "local_sgd"  # "accumulation": DeepSpeed with so many micro-batches in a step; else DDP has none
    stage: int = 2  # of ZeRO, where there is ZeRO
    interval: int = 32  # 1: every step
    wire: str = "fp32"  # for DeepSpeed its communication_data_type, for DDP its communication hook
    delay: int = 0
    fragments: int = 1  # more: one after the other (``swarm.streaming``)
    schedule: str = "fixed"  # of ``swarm.schedule``
    talks: bool = True  # false: the same stack, and the ends have nothing to say to each other
    bandwidth: str = "100 Mbit/s"
    number: int = 0  # of the repetition

    @property
    def accumulation(self) -> int:
        """Micro-batches in an optimizer step."""
        return self.interval if self.rule == "accumulation" else 1

    @property
    def alone(self) -> Run:
        """What its compute share is measured against: measured anew among the runs over each link."""
        if self.rule == "accumulation":
            return replace(self, wire="fp32", talks=False)
        rule = "diloco" if self.stack == "torchft" else "local_sgd"
        return Run(self.stack, rule, self.stage, talks=False, bandwidth=self.bandwidth, number=self.number)

    @property
    def steps(self) -> tuple[int, int]:
        """(before measuring, measured): whole intervals where there are any."""
        if not self.talks:
            return 8, 48
        if self.wire == "PowerSGD":
            return 4, 32  # the first two are not compressed
        if self.interval == 1:
            return 1, 4 if self.bandwidth == "20 Mbit/s" else 8
        if self.schedule != "fixed":
            return 64, 64  # until the interval is what it will be
        return self.interval, max(64, self.interval)

    @property
    def name(self) -> str:
        """A row of the table, whatever the bandwidth."""
        stack = f"{self.stack} ZeRO {self.stage}" if self.stack in ("DeepSpeed", "ds_pso") else self.stack
        stack += " accumulation" if self.rule == "accumulation" else ""
        if not self.talks:
            return f"{stack}, alone"
        parts = [stack] if self.stack in ("DeepSpeed", "DDP") else [stack, self.rule]
        parts.append(f"n={self.interval}")
        parts += [self.wire] if self.wire != "fp32" else []
        parts += [f"d={self.delay}"] if self.delay else []
        parts += [f"streaming F={self.fragments}"] if self.fragments > 1 else []
        parts += [self.schedule] if self.schedule != "fixed" else []
        return " ".join(parts)

    def __str__(self) -> str:
        return f"{self.name}, {self.bandwidth}, run {self.number}"


# Over every link: what synchronous training can do to send less, and local SGD without a wait that is hidden.
_SYNCHRONOUS = [
    Run("DDP", interval=1),
    Run("DDP", interval=1, wire="fp16"),
    Run("DDP", interval=1, wire="PowerSGD"),
    Run("DeepSpeed", stage=0, interval=1, wire="bf16"),
    Run("DeepSpeed", stage=1, interval=1, wire="bf16"),
    Run("DeepSpeed", interval=1, wire="bf16"),
    Run("DeepSpeed", "accumulation", stage=1, interval=8),
    Run("Accelerate", interval=8),
]

# Over each link what tells something there. torchft's delay is as long as the exchange, or the longest that it takes.
_OVER = {
    "1 Gbit/s": [
        *_SYNCHRONOUS,
        Run("Accelerate"),
        Run("torchft", "diloco", delay=2),
        Run("torchft", "diloco", delay=1, fragments=4),
        Run("torchft", "diloco", interval=8, delay=2),
        Run("torchft", "diloco", interval=8, delay=1, fragments=4),
        Run("DeepSpeed", interval=1),
        Run("torchft", "diloco"),
        Run("ds_pso"),
        Run("torchft", "diloco", interval=8),
        Run("ds_pso", interval=8),
        Run("ds_pso", interval=8, wire="int4", delay=1),
    ],
    "100 Mbit/s": [
        *_SYNCHRONOUS,
        *(Run("DeepSpeed", stage=stage, interval=1, wire="fp16") for stage in range(3)),
        Run("torchft", "diloco", delay=16),
        Run("torchft", "diloco", delay=4, fragments=4),
        Run("torchft", "diloco", interval=8, delay=7),
        Run("torchft", "diloco", interval=8, delay=1, fragments=4),
        Run("DeepSpeed", interval=1),
        Run("torchft", "diloco"),
        Run("torchft", "diloco", delay=8),
        Run("torchft", "local_sgd"),
        Run("Accelerate"),
        Run("ds_pso"),
        Run("ds_pso", "diloco"),
        Run("ds_pso", wire="bf16"),
        Run("ds_pso", wire="int8"),
        Run("ds_pso", wire="int4"),
        Run("ds_pso", delay=8),
        Run("ds_pso", wire="int4", delay=2),
        Run("ds_pso", wire="int4", delay=1, fragments=4),
        Run("torchft", "diloco", interval=8),
        Run("ds_pso", interval=8),
        Run("ds_pso", interval=8, wire="int8", delay=4),
        Run("ds_pso", interval=8, wire="int4", delay=2),
        Run("ds_pso", stage=0, interval=8, wire="int4", delay=2),
        Run("ds_pso", interval=8, wire="int4", delay=2, schedule="adaptive"),
        Run("ds_pso", interval=8, wire="int4", delay=2, schedule="wall_time"),
        Run("ds_pso", interval=8, wire="int4", delay=2, fragments=4),
        Run("ds_pso", interval=4, wire="int4", delay=2),
        Run("ds_pso", interval=4, wire="int4", delay=1, fragments=4),
    ],
    "20 Mbit/s": [
        *_SYNCHRONOUS,
        Run("Accelerate"),
        Run("torchft", "diloco", delay=31),
        Run("torchft", "diloco", delay=7, fragments=4),
        Run("torchft", "diloco", interval=8),
        Run("torchft", "diloco", interval=8, delay=7),
        Run("torchft", "diloco", interval=8, delay=1, fragments=4),
        Run("DeepSpeed", interval=1),
        Run("torchft", "diloco"),
        Run("ds_pso"),
        Run("ds_pso", wire="int4", delay=2),
        Run("ds_pso", wire="int4", delay=8),
        Run("ds_pso", wire="int4", delay=2, fragments=4),
    ],
}


def runs(number: int) -> Iterator[Run]:
    """All of one repetition, link after link: what goes over it, and each stack alone in the middle of its own runs."""
    for link in BANDWIDTHS:
        talking = [replace(run, bandwidth=link, number=number) for run in _OVER[link]]
        for index, run in enumerate(talking):
            yield run
            same = [place for place, other in enumerate(talking) if other.alone == run.alone]
            if index == same[(len(same) - 1) // 2]:
                yield run.alone
