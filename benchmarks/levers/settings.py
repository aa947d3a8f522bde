"""What is compared: a size of the experiment, and the settings, each a ``swarm`` section and an inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTICLES = 4
SEEDS = (1, 2, 3)  # the rate is found with the first


@dataclass(frozen=True)
class Size:
    """A model, and how it is trained: 12 tokens per parameter, about 2,000 at each step.

    Attributes:
        model: ``llama:<layers>x<width>``.
        steps: optimizer steps.
        batch: sequences per particle and step.
        text: see ``ds_pso.training.text.read_documents``.
    """

    model: str
    steps: int
    batch: int
    text: str = "python"


SEQ_LENGTH = 128
VOCABULARY = 1024
HELD_OUT = 512  # sequences on which rates are chosen, and as many others on which the table reports
SIZES = {
    "small": Size("llama:4x64", steps=1600, batch=4),  # 0.25 million parameters
    "medium": Size("llama:4x128", steps=2600, batch=8),  # 0.88 million
}


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        name: what is compared.
        inner: optimizer of the particles.
        section: keys of ``swarm``, beside ``particles``.
        pull: after each step, what part of the way every particle goes back to the last common weights; see ``train``.
    """

    name: str
    inner: Literal["AdamW", "Muon"]
    section: Mapping[str, Any] = field(default_factory=dict)
    pull: float = 0.0

    @property
    def worlds(self) -> int:
        """Particles that there are: one world sees what all of them would see."""
        is_one = self.section["sync_mode"] == "allreduce" or self.section.get("particles") == 1
        return 1 if is_one else PARTICLES

    def __str__(self) -> str:
        return f"{self.inner}: {self.name}"


def _local(interval: int, **keys: Any) -> dict[str, Any]:
    return {"sync_mode": "local_sgd", "sync_interval": interval, **keys}


def _sparse(interval: int, residual: str, density: float = 1 / 64, **keys: Any) -> dict[str, Any]:
    return _local(interval, wire="sparse", residual=residual, sparse={"density": density}, **keys)


def _diloco(interval: int, options: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    return {"sync_mode": "diloco", "sync_interval": interval, "diloco": dict(options), **keys}


_PLAIN_RDA = {"outer_lr": 1.0, "outer_momentum": 0.0, "merge": "rda"}
_IN_TURN = {"first_every": 3, "second_every": 6}


_EVERY: dict[str, dict[str, Any]] = {
    "every step": {"sync_mode": "allreduce"},
    "fp32, n = 32": _local(32),
    # The bytes of fp32 at n = 32.
    "int4, n = 4": _local(4, wire="int4"),
    "int2, n = 2": _local(2, wire="int2"),
    "sparse 1/32, n = 1, residual in weights": _sparse(1, "weights", 1 / 32),
    # About 1/70 of the bytes of every step.
    "int2, n = 5": _local(5, wire="int2"),
    "int4, n = 9": _local(9, wire="int4"),
    "int2, n = 5, outer step": _diloco(5, {}, wire="int2"),
    "sparse 1/64, n = 1, residual in weights": _sparse(1, "weights"),
    "sparse 1/64, n = 1": _sparse(1, "wire"),
    # About 1/300.
    "int2, n = 20": _local(20, wire="int2"),
    "sparse 1/64, n = 4": _sparse(4, "wire"),
    "sparse 1/64, n = 4, residual in weights": _sparse(4, "weights"),
    "sparse 1/256, n = 1, residual in weights": _sparse(1, "weights", 1 / 256),
    # Others at n = 32, and what is lost where nothing is rounded.
    "fp32, n = 32, RDA": _diloco(32, _PLAIN_RDA),
    "fp32, n = 32, outer step": _diloco(32, {}),
    "fp32, n = 32, moments averaged": _local(32, optimizer_state="average"),
    "fp32, n = 32, moments at 3n/6n": _local(32, optimizer_state="average", moments=_IN_TURN),
    "fp32, n = 32, int8 moments at 3n/6n": _local(32, optimizer_state="average", moments={**_IN_TURN, "wire": "int8"}),
    "every step, an outer step every 8": _diloco(8, {}, particles=1),
    "fp32, n = 11": _local(11),  # the bytes of the row above
    "fp32, n = 1": _local(1),
    "fp32, n = 4": _local(4),
}
_INNER: tuple[Literal["AdamW", "Muon"], ...] = ("Muon", "AdamW")
SETTINGS = [Setting(name, inner, section) for name, section in _EVERY.items() for inner in _INNER]
SETTINGS += [Setting("fp32, n = 32, pull 1/100 a step", inner, _local(32), pull=0.01) for inner in _INNER]
# Of Muon's rate, for what Adam trains beside it. In 600 steps of the small size, with an all-reduce at every step and
# Muon at 0.02, validation losses were 3.404 with 0.1, 3.251 with 0.2 and 3.231 with 0.4.
ADAM_PART = 0.4
FIRST_RATE = {"AdamW": 0.008, "Muon": 0.02}


def optimizer_of(inner: str, lr: float) -> tuple[dict[str, Any], float | list[float], float]:
    """Return DeepSpeed's ``optimizer``, the rates of its groups for the schedule, and ``gradient_clipping``.

    Muon trains the matrices of the blocks; embeddings and norms are left to Adam at ``ADAM_PART`` of its rate. Its
    update is not clipped: DeepSpeed would clip what Newton-Schulz made, whose norm has nothing to do with the
    gradient's.
    """
    if inner == "AdamW":
        params = {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
        return {"type": "AdamW", "params": params}, lr, 1.0
    params = {"lr": lr, "momentum": 0.95, "weight_decay": 0.01, "betas": [0.9, 0.95], "torch_adam": True}
    return {"type": "Muon", "params": params}, [lr, ADAM_PART * lr], 0.0
