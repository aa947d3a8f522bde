"""Lightning's Trainer as a particle: data, rates, validation, checkpoints, logs, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

NAMES = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(not NAMES, reason='needs Lightning: pip install "ds_pso[lightning]"')

SAMPLES, BATCH, EPOCHS = 103, 4, 3
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


def library() -> Any:
    return importlib.import_module("lightning.pytorch" if NAMES[0] == "lightning" else NAMES[0])


def rows(num_samples: int = SAMPLES) -> TensorDataset:
    """Numbered samples: x, y, number."""
    x = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.pow(2).sum(1, keepdim=True), torch.arange(num_samples))


def a_module() -> Any:
    class Module(library().LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Dropout(0.1), torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
            )
            self.seen: dict[int, list[int]] = {}  # by epoch
            self.rates: list[float] = []
            self.validated: list[float] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            x, y, number = batch
            self.seen.setdefault(self.current_epoch, []).extend(number.tolist())
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            loss = torch.nn.functional.mse_loss(self.layers(x), y)
            self.log("loss", loss, on_step=True)
            return loss

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            loss = torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
            self.log("held_out", loss)
            if not self.trainer.sanity_checking:
                self.validated.append(loss.item())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def on_cpu(**options: Any) -> Any:
    """Lightning's strategy, which asks for CUDA before it does anything, without that question."""
    strategies = importlib.import_module(f"{library().__name__}.strategies")
    deepspeed = importlib.import_module(f"{library().__name__}.strategies.deepspeed")

    strategy = strategies.DeepSpeedStrategy

    class OnCpu(strategy):
        def setup_environment(self) -> None:
            super(strategy, self).setup_environment()

        @property
        def root_device(self) -> torch.device:
            assert super().root_device == torch.device("cpu")
            return torch.device("cpu", 0)  # DeepSpeed is given its number

    deepspeed._validate_device_index_selection = lambda devices: None
    return OnCpu(process_group_backend="gloo", **options)


def fit(folder: Path, particles: int, saves: str = "", resumes: str | None = None) -> dict[str, Any]:
    """Train for ``EPOCHS`` epochs.

    Args:
        saves: when checkpoints are written: "step", after each 4th optimizer step.
        resumes: name of the checkpoint to continue from.
    """
    library()
    import ds_pso
    from ds_pso.lightning import SwarmCallback, SwarmEnvironment

    config = CONFIG | {"swarm": {"particles": particles, "sync_interval": 5, "sync_mode": "diloco"}}
    with ds_pso.init(config, run_dir=folder) as swarm:
        checkpoints = swarm.world.layout.particle_folder(folder / "checkpoints")
        saver = library().callbacks.ModelCheckpoint(
            checkpoints, "{step}", every_n_train_steps=4, save_top_k=-1, save_on_train_epoch_end=False
        )
        callback = SwarmCallback(swarm, export=folder / "model")
        trainer = library().Trainer(
            strategy=on_cpu(config=swarm.ds_config, cluster_environment=SwarmEnvironment(swarm)),
            accelerator="cpu",
            devices=int(os.environ["LAUNCHED_WORLD_SIZE"]),  # of the machine, as "auto" finds GPUs
            callbacks=[callback, *([saver] if saves else [])],
            enable_checkpointing=bool(saves),
            use_distributed_sampler=False,
            logger=library().loggers.CSVLogger(folder / "logs"),
            log_every_n_steps=1,
            max_epochs=EPOCHS,
            default_root_dir=folder,
        )
        data = rows()
        loader = DataLoader(data, batch_size=BATCH, sampler=swarm.sampler(data, batch_size=BATCH))
        module = a_module()
        torch.manual_seed(swarm.world.layout.rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(
                module, loader, DataLoader(rows(32), batch_size=32), ckpt_path=resumes and checkpoints / resumes
            )
        return {
            "seen": module.seen,
            "rates": module.rates,
            "validated": module.validated,
            "syncs": swarm.totals.count,
            "steps": swarm.engine.global_steps,
            "global_step": trainer.global_step,
            "weights": [p.detach().float().numpy().copy() for p in module.parameters()],
            "random": torch.rand(2).tolist(),
            "loggers": len(trainer.loggers),
        }


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_fit(pool, tmp_path, size):
    ranks = pool.run(fit, tmp_path, 2, world_size=2 * size, timeout=120)
    batches = SAMPLES // (2 * size * BATCH)
    steps = EPOCHS * batches
    for rank in ranks:
        assert rank["steps"] == rank["global_step"] == steps
        assert rank["syncs"] == steps // 5
        assert rank["rates"] == pytest.approx([0.02 * (1 - step / steps) for step in range(steps)])
        assert rank["validated"] == ranks[0]["validated"], "the consensus is one model"
        assert len(rank["validated"]) == EPOCHS
    for epoch in range(EPOCHS):
        seen = [number for rank in ranks for number in rank["seen"][epoch]]
        assert len(seen) == len(set(seen)) == batches * 2 * size * BATCH
    assert [rank["loggers"] for rank in ranks] == [1] * size + [0] * size
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1
    assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("particles", "size"), [(2, 1), (2, 2), (1, 2)])
def test_a_fit_goes_on_bit_for_bit(pool, tmp_path, particles, size):
    """From a checkpoint in the middle of an epoch, with dropout, a rule that has state, and momentum."""
    ranks = particles * size
    whole = pool.run(fit, tmp_path / "whole", particles, "step", world_size=ranks, timeout=120)
    batches = SAMPLES // (ranks * BATCH)
    step = 4 if ranks == 4 else 8
    assert step % batches
    (tmp_path / "whole/checkpoints").rename(tmp_path / "checkpoints")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "resumed/checkpoints")
    named = f"step={step}.ckpt"
    resumed = pool.run(fit, tmp_path / "resumed", particles, "", named, world_size=ranks, timeout=120)
    for before, after in zip(whole, resumed, strict=True):
        assert after["steps"] == after["global_step"] == before["steps"]
        assert after["syncs"] == before["syncs"]
        assert after["rates"] == before["rates"][step:]
        last = {epoch: numbers[-len(after["seen"].get(epoch, ())) :] for epoch, numbers in before["seen"].items()}
        assert sum(map(len, after["seen"].values())) == (before["steps"] - step) * BATCH
        assert after["seen"] == {epoch: last[epoch] for epoch in after["seen"]}
        assert after["validated"] == before["validated"][step // batches :]
        for one, other in zip(before["weights"], after["weights"], strict=True):
            assert (one == other).all()
        assert after["random"] == before["random"]
    assert (whole[0]["weights"][0] != whole[-1]["weights"][0]).any() == (particles > 1)


def set_up_wrongly(folder: Path) -> dict[str, str]:
    """The message of each refusal, by name."""
    library()
    import ds_pso
    from ds_pso.lightning import SwarmCallback, SwarmEnvironment

    found = {}
    world = None
    wrong = ("strategy", "environment", "sampler of Lightning", "no sampler", "dirpath", "ckpt_path", "elsewhere")
    for name in wrong:
        swarm = ds_pso.init(CONFIG | {"swarm": {"particles": 2}}, world=world)
        world = swarm.world
        environment = {} if name == "environment" else {"cluster_environment": SwarmEnvironment(swarm)}
        own = world.layout.particle_folder(folder / "checkpoints")
        saver = library().callbacks.ModelCheckpoint(folder / "shared" if name == "dirpath" else own)
        data = rows()
        sampler = None if name == "no sampler" else swarm.sampler(data)
        trainer = library().Trainer(
            strategy="auto" if name == "strategy" else on_cpu(config=swarm.ds_config, **environment),
            accelerator="cpu",
            devices=1 if name in ("strategy", "environment") else 2,
            callbacks=[SwarmCallback(swarm), saver],
            use_distributed_sampler=name == "sampler of Lightning",
            logger=False,
            max_steps=2,
            default_root_dir=folder,
        )
        path = {"ckpt_path": own / "nothing.ckpt", "elsewhere": folder / "shared"}.get(name)
        # Without SwarmEnvironment the device is looked up first: the second particle has none among the Trainer's.
        with pytest.raises((ds_pso.SwarmError, *([IndexError] if name == "environment" else []))) as caught:
            trainer.fit(a_module(), DataLoader(data, BATCH, sampler=sampler), ckpt_path=path)
        found[name] = str(caught.value)
    world.close()
    return found


def test_what_is_wrong_is_named(pool, tmp_path):
    ranks = pool.run(set_up_wrongly, tmp_path, world_size=2, timeout=120)
    assert "cluster_environment=SwarmEnvironment(swarm)" in ranks[0]["environment"]
    for found in ranks:
        for name, text in {
            "strategy": "a particle is a DeepSpeed job",
            "sampler of Lightning": "Trainer(use_distributed_sampler=True)",
            "no sampler": "the training loader has a SequentialSampler",
            "dirpath": "every particle has checkpoints of its own",
            "ckpt_path": "holds nothing of the swarm",
            "elsewhere": "writes and reads below a folder particle_",
        }.items():
            assert text in found[name], name


def run_page(folder: Path, script: str) -> None:
    """With four processes on a CPU as on a machine with four GPUs."""
    cpu = importlib.import_module("lightning.pytorch.accelerators").CPUAccelerator
    cpu.auto_device_count = staticmethod(lambda: 4)
    strategies = importlib.import_module("lightning.pytorch.strategies")
    strategies.DeepSpeedStrategy = type(on_cpu())
    os.chdir(folder)
    path = Path(f"script_{os.environ['LOCAL_RANK']}.py")
    path.write_text(script, encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.skipif("lightning" not in NAMES, reason="the page imports it under this name")
@pytest.mark.slow
def test_the_script_of_the_page(pool, tmp_path):
    page = (Path(__file__).parents[1] / "docs/lightning.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    pool.run(run_page, tmp_path, script.replace("print(f", "open('printed', 'w').write(f"), timeout=120)
    said = (tmp_path / "printed").read_text()
    assert said.startswith("2 particles x 2 ranks, local_sgd every 8 steps: held-out loss ")
    assert float(said.rpartition(" ")[2]) < 1  # 8 is the variance of the targets
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert list((tmp_path / "out/checkpoints").glob("particle_1/last.ckpt/swarm"))
