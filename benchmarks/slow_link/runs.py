"""Which runs the table consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MICRO_BATCH, SEQ_LENGTH = 4, 128  # 512 tokens a step at each end
BANDWIDTHS = {"1 Gbit/s": 1e9, "100 Mbit/s": 1e8, "20 Mbit/s": 2e7}


@dataclass(frozen=True)
class Run:
    """One run of one stack. The defaults are what most have."""

    stack: str  # "DeepSpeed", "ds_pso", "torchft" or "Accelerate"
    rule: str = "local_sgd"
    stage: int = 2  # of ZeRO, where there is ZeRO
    interval: int = 32  # 1: every step
    wire: str = "fp32"
    delay: int = 0
    fragments: int = 1  # more: one after the other (``swarm.streaming``)
    schedule: str = "fixed"  # of ``swarm.schedule``
    talks: bool = True  # false: the same stack, and the ends have nothing to say to each other
    bandwidth: str = "100 Mbit/s"
    number: int = 0  # of the repetition

    @property
    def alone(self) -> Run:
        """What its compute share is measured against: measured anew among the runs over each link."""
        rule = "diloco" if self.stack == "torchft" else "local_sgd"
        return Run(self.stack, rule, self.stage, talks=False, bandwidth=self.bandwidth, number=self.number)

    @property
    def steps(self) -> tuple[int, int]:
        """(before measuring, measured): whole intervals where there are any."""
        if not self.talks:
            return 4, 48
        if self.interval == 1:
            return 1, 4 if self.bandwidth == "20 Mbit/s" else 8
        if self.schedule != "fixed":
            return 64, 64  # until the interval is what it will be
        return self.interval, max(64, self.interval)

    @property
    def name(self) -> str:
        """A row of the table, whatever the bandwidth."""
        parts = [self.stack, f"ZeRO {self.stage}"] if self.stack in ("DeepSpeed", "ds_pso") else [self.stack]
        if self.stack != "DeepSpeed":
            parts.append(self.rule)
        if not self.talks:
            return f"{self.stack}{f' ZeRO {self.stage}' if 'ZeRO' in ' '.join(parts) else ''}, alone"
        parts.append(f"n={self.interval}")
        parts += [self.wire] if self.wire != "fp32" else []
        parts += [f"d={self.delay}"] if self.delay else []
        parts += [f"streaming F={self.fragments}"] if self.fragments > 1 else []
        parts += [self.schedule] if self.schedule != "fixed" else []
        return " ".join(parts)

    def __str__(self) -> str:
        return f"{self.name}, {self.bandwidth}, run {self.number}"


# Over each link what tells something there.
_OVER = {
    "1 Gbit/s": [
        Run("DeepSpeed", interval=1),
        Run("torchft", "diloco"),
        Run("ds_pso"),
        Run("torchft", "diloco", interval=8),
        Run("ds_pso", interval=8),
        Run("ds_pso", interval=8, wire="int4", delay=1),
    ],
    "100 Mbit/s": [
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
