"""A record of the numbers that a change of the code must not change.

``python tests/numerics.py`` trains a small model with every sync mode, at ZeRO 0, 2 and 3 and with several wires and
delays, and compares the hashes of the final weights with those in ``numerics.json``. ``--write`` records them instead.
It uses what a training script uses, and nothing from inside the package, so it runs before and after a redesign.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from pool import Pool
from torch import Tensor, nn

import ds_pso

RECORD = Path(__file__).with_name("numerics.json")
PARTICLES, SIZE = 2, 2
STEPS, INTERVAL, ROWS = 20, 4, 4
REFUSED = "refused"
STAGES = (0, 2, 3)
MODES: dict[str, dict[str, Any]] = {  # the rule's options
    "local_sgd": {},
    "delayed": {},
    "diloco": {"outer_lr": 0.7, "outer_momentum": 0.6},
    "easgd": {"beta": 0.8},
    "nosync": {"pressure": 0.2, "final_pressure": 0.9},
    "pso": {"inertia": 0.3, "cognitive": 0.5, "social": 0.8, "randomness": "per_tensor"},
    "swarm": {"inertia": 0.5, "lr_spread": 2.0, "lr_step": 1.3, "fitness_steps": 3},
    "line_search": {},
}
# A guard scores weights on a probe batch, and with a delay nothing can be scored.
UNGUARDED = {"inertia": 0.5, "guard": False, "lr_spread": 1.0}
# More of the section, where a mode needs it.
SECTIONS: dict[str, dict[str, Any]] = {
    # By default the interval follows the clock, too.
    "delayed": {"schedule": {"type": "adaptive", "min_interval": INTERVAL, "compute_share": 0.0}},
    "nosync": {"total_steps": STEPS},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int4": {"wire": "int4"},
    "delay2": {"delay": 2},
    "streaming": {"delay": 2, "fragments": 2, "streaming": True, "schedule": {"type": "fixed"}},
}


@dataclass(frozen=True)
class Case:
    """One training."""

    mode: str
    stage: int
    variant: str

    def __str__(self) -> str:
        return f"{self.mode}/zero{self.stage}/{self.variant}"


@dataclass(frozen=True)
class Found:
    """What the ranks of a case have in the end."""

    parameters: list[str] = field(default_factory=list)  # a hash for each rank; none where the config refuses the case
    buffers: list[str] = field(default_factory=list)

    @property
    def hash(self) -> str:
        if not self.parameters:
            return REFUSED
        return hashlib.sha256(" ".join(self.parameters + self.buffers).encode()).hexdigest()[:16]


CASES = [Case(mode, stage, variant) for stage in STAGES for mode in MODES for variant in VARIANTS]


def run(pool: Pool, cases: Sequence[Case] = CASES) -> dict[str, Found]:
    """Train the cases, those of a ZeRO stage in one launch; return what was found, by name."""
    found = {}
    for stage in STAGES:
        of_stage = [case for case in cases if case.stage == stage]
        if of_stage:
            ranks = pool.run(train_each, of_stage, world_size=PARTICLES * SIZE, timeout=240)
            for case, *hashes in zip(of_stage, *ranks, strict=True):
                kept = [pair for pair in hashes if pair is not None]
                assert len(kept) in (0, len(hashes)), f"{case}: some ranks refuse it"
                found[str(case)] = Found([pair[0] for pair in kept], [pair[1] for pair in kept])
    return found


def machine() -> dict[str, str]:
    """Return what the hashes depend on beside the code."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "model name" in said:  # several generations may share a name
            processor = f"{said['model name']}, family {said.get('cpu family')}, model {said.get('model')}"
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor,
    }


# -- on the ranks -----------------------------------------------------------------------------


def train_each(cases: Sequence[Case]) -> list[tuple[str, str] | None]:
    """Train them one after the other; return the hashes of parameters and of buffers, or None where it is refused."""
    particle, rank = divmod(int(os.environ["RANK"]), SIZE)  # a swarm changes the environment
    swarm, found = None, []
    for case in cases:
        try:
            swarm = ds_pso.init(config(case), world=swarm and swarm.world)
        except ds_pso.ConfigError:
            found.append(None)
            continue
        engine = train(swarm, particle, rank)
        found.append(
            (
                hashed([whole(parameter) for parameter in engine.module.parameters()]),
                hashed(list(engine.module.buffers())),
            )
        )
    if swarm is not None:
        swarm.close()
    return found


def config(case: Case) -> dict[str, Any]:
    """Return DeepSpeed's config with the swarm's section."""
    late = "delay" in VARIANTS[case.variant]
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "swarm": {
            "particles": PARTICLES,
            "sync_mode": case.mode,
            "sync_interval": INTERVAL,
            "timeout_s": 60,
            case.mode: UNGUARDED if late and case.mode == "swarm" else MODES[case.mode],
            **SECTIONS.get(case.mode, {}),
            **VARIANTS[case.variant],
        },
    }


class Net(nn.Module):
    """Tensors of odd sizes, enough numbers for several blocks of the wire, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 37)
        self.norm = nn.BatchNorm1d(37)
        self.second = nn.Linear(37, 19)
        self.last = nn.Linear(19, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.second(x))) * self.scale


def batch(particle: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return inputs (4, 13) and targets (4, 3); particles differ in noise, so that one is better than another."""
    generator = torch.Generator().manual_seed(10_000 * particle + 10 * step + rank)
    x = torch.randn(ROWS, 13, generator=generator)
    noise = 0.3 * (particle + 1) * torch.randn(ROWS, 3, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.mean(1)], 1) + noise


def train(swarm: ds_pso.Swarm, particle: int, rank: int) -> Any:
    """Train to the last step, and return the engine."""
    torch.manual_seed(7)
    model = Net()
    gc.freeze()  # DeepSpeed collects garbage at ZeRO 3, and would look at all that was ever imported
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)

    def loss_on(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(engine(x), y)

    def probe(index: int) -> Tensor:
        engine.eval()
        loss = loss_on(*batch(PARTICLES, index, rank))
        engine.train()
        return loss

    swarm.attach(engine, probe=probe)
    for step in range(STEPS):
        engine.backward(loss_on(*batch(particle, step, rank)))
        engine.step()
    swarm.finish_pending()
    return engine


def whole(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter, gathered if ZeRO 3 has partitioned it."""
    gather = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter]) if gather else contextlib.nullcontext():
        return parameter.detach().clone()


def hashed(tensors: Sequence[Tensor]) -> str:
    """Return a hash of shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# -- the command ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Compare with the record, or write it; return 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the hashes instead of comparing them")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        hashes = {name: found.hash for name, found in run(Pool(Path(folder))).items()}
    if arguments.write:
        RECORD.write_text(json.dumps({"machine": machine(), "hashes": hashes}, indent=2) + "\n", encoding="utf-8")
        print(f"{len(hashes)} cases in {RECORD}")
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["machine"] != machine():
        print(f"recorded on another machine, where sums may be rounded otherwise: {record['machine']}")
    changed = [name for name in {**record["hashes"], **hashes} if record["hashes"].get(name) != hashes.get(name)]
    for name in changed:
        print(f"{name}: {record['hashes'].get(name)} recorded, {hashes.get(name)} now")
    print(f"{len(changed)} of {len(hashes)} cases differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
