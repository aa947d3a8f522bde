"""What works under which host: features of a swarm under two Trainers give the bits of a script of one's own.

The page that lists it names tests, and reasons; both are looked up.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from test_docs import ROOT, page, templates
from variants import slow_but

import ds_pso

BATCH, EPOCHS, ROWS, RANKS = 4, 2, 64, 2
STEPS = EPOCHS * ROWS // (BATCH * RANKS)
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
}
FEATURES: dict[str, dict[str, Any]] = {
    "late": {"sync_interval": 4, "wire": "int4", "delay": 2},
    "fragments": {"sync_interval": 4, "wire": "int4", "delay": 4, "fragments": 2},
    "streaming": {"sync_mode": "diloco", "sync_interval": 4, "fragments": 2, "streaming": True, "delay": 1},
    "sparse": {"sync_interval": 1, "wire": "sparse", "residual": "weights"},
    "adaptive": {"sync_interval": 2, "schedule": {"type": "adaptive", "compute_share": 0.0, "max_interval": 8}},
    "moments": {"sync_interval": 4, "optimizer_state": "average"},
    "probe": {"sync_interval": 4, "sync_mode": "pso", "fitness": "probe"},
    "ZeRO 3": {"sync_interval": 4},
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), y)}


class Rows(torch.utils.data.Dataset):
    """Remembers which of them were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        self.y = self.x.sum(dim=1, keepdim=True)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked.append(index)
        return {"x": self.x[index], "y": self.y[index]}


def probe_of(model: Callable[..., dict[str, torch.Tensor]]) -> Callable[[int], torch.Tensor]:
    rows = Rows()
    return lambda index: model(rows.x, rows.y)["loss"]


# -- the hosts ------------------------------------------------------------------------------


def own_script(swarm: ds_pso.Swarm, folder: Path, batches: list[list[int]]) -> tuple[torch.nn.Module, list[int]]:
    """The same samples in the same order, without a host."""
    import deepspeed

    model, rows = Net(), Rows()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
    swarm.attach(engine, probe=probe_of(engine))
    for batch in batches:
        engine.backward(engine(rows.x[batch], rows.y[batch])["loss"])
        engine.step()
    swarm.finish_pending()
    swarm.merge()
    return engine.module, []


def accelerate(swarm: ds_pso.Swarm, folder: Path, _: object) -> tuple[torch.nn.Module, list[int]]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
    model, rows = Net(), Rows()
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    optimizer = DummyOptim(model.parameters(), lr=0.02)
    engine, optimizer, loader = swarm.prepare(
        accelerator, model, optimizer, loader, probe=lambda index: probe_of(engine)(index)
    )
    for _ in range(EPOCHS):
        for batch in loader:
            accelerator.backward(engine(**batch)["loss"])
    swarm.finish_pending()
    swarm.merge()
    return engine.module, rows.asked


def hf_trainer(swarm: ds_pso.Swarm, folder: Path, _: object) -> tuple[torch.nn.Module, list[int]]:
    from transformers import Trainer, TrainingArguments

    from ds_pso.hf_trainer import SwarmCallback

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        deepspeed=swarm.ds_config,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Rows()
    trainer = Trainer(Net(), args, train_dataset=rows)
    trainer.add_callback(SwarmCallback(swarm, trainer))
    trainer.train()
    return trainer.deepspeed.module, rows.asked


HOSTS = {host.__name__: host for host in (own_script, accelerate, hf_trainer)}


def train(host: str, feature: str, folder: Path, batches: Any = None) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    section = {"particles": 2, "total_steps": STEPS, **FEATURES[feature]}
    stage = {"zero_optimization": {"stage": 3}} if feature == "ZeRO 3" else {}
    with ds_pso.init(CONFIG | stage | {"swarm": section}) as swarm:
        own = None if batches is None else batches[swarm.world.layout.rank]
        model, asked = HOSTS[host](swarm, folder, own)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=bool(stage)):
            weights = [p.detach().numpy().copy() for p in model.parameters()]
        return weights, asked, swarm.totals.count, swarm.totals.bytes_received


CASES = [
    (host, feature)
    for host in ("accelerate", "hf_trainer")
    for feature in FEATURES
    if (host, feature) != ("hf_trainer", "probe")
]
SHOWN = [("accelerate", "late"), ("hf_trainer", "streaming")]


@pytest.mark.parametrize(("host", "feature"), slow_but(SHOWN, CASES))
def test_a_host_gives_the_bits_of_a_script_of_ones_own(pool: Pool, tmp_path: Path, host: str, feature: str) -> None:
    ranks = pool.run(train, host, feature, tmp_path, world_size=RANKS, timeout=120)
    asked = [rank[1] for rank in ranks]
    assert sorted(asked[0] + asked[1]) == sorted([*range(ROWS)] * EPOCHS)
    batches = [[mine[i : i + BATCH] for i in range(0, len(mine), BATCH)] for mine in asked]
    own = pool.run(train, "own_script", feature, tmp_path, batches, world_size=RANKS, timeout=120)
    for (found, _, *totals), (expected, _, *others) in zip(ranks, own, strict=True):
        assert totals == others
        assert totals[0] > 1
        for one, other in zip(found, expected, strict=True):
            assert (one == other).all()


def train_with_a_probe(folder: Path) -> str:
    with pytest.raises(ds_pso.ConfigError) as error:
        train("hf_trainer", "probe", folder)
    return str(error.value)


@pytest.mark.slow
def test_the_trainer_has_no_probe(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(train_with_a_probe, tmp_path, world_size=RANKS, timeout=120):
        assert 'swarm.fitness = "probe": give swarm.attach a probe' in said


# -- the page -------------------------------------------------------------------------------

PAGE = page("docs/hosts.md")


def cells() -> list[tuple[str, str, str]]:
    """Feature, host and answer of every table."""
    found = []
    for header, rows in re.findall(r"^\| \| (.+?) \|\n\|[ -|]+\|\n((?:\| .+\|\n)+)", PAGE, flags=re.MULTILINE):
        hosts = header.split(" | ")
        for row in rows.splitlines():
            feature, *answers = row.strip("| ").split(" | ")
            assert len(answers) == len(hosts), feature
            found += [(feature, host, answer) for host, answer in zip(hosts, answers, strict=True)]
    return found


def listed(heading: str) -> dict[int, str]:
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    items = re.findall(r"^(\d+)\. (.+(?:\n   .+)*)$", text, flags=re.MULTILINE)
    return {int(number): " ".join(item.split()) for number, item in items}


TESTS, REASONS = listed("The tests"), listed("The reasons")


def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_cell_is_a_test_or_a_reason() -> None:
    answers = cells()
    assert len(answers) > 60
    used: dict[str, set[int]] = {"yes": set(), "no": set()}
    for feature, host, answer in answers:
        match = re.fullmatch(r"(yes|no), (\d+)|untested", answer)
        assert match, (feature, host, answer)
        if match[1]:
            used[match[1]].add(int(match[2]))
    assert used["yes"] == set(TESTS), "every test of the list is named, and no other"
    assert used["no"] == set(REASONS), "every reason of the list is named, and no other"


@pytest.mark.parametrize("number", TESTS)
def test_the_tests_that_are_named_exist(number: int) -> None:
    path, *names = re.findall(r"`([^`]+)`", TESTS[number])
    assert path.startswith("tests/")
    found = functions_in(ROOT / path)
    assert names
    for name in names:
        assert name.partition("[")[0] in found, name


@pytest.mark.parametrize("number", REASONS)
def test_the_errors_that_are_named_are_said(number: int) -> None:
    for message in re.findall(r"`([^`]+)`", REASONS[number]):
        if len(message) < 20:
            continue  # a name
        assert any(message.strip("…") in text for text in templates()), message
