"""``swarm.prepare`` against Accelerate alone: schedule, data, checkpoints; and what it refuses."""

from __future__ import annotations

import functools
import os
import re
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from variants import slow_but

SAMPLES, BATCH, EPOCHS = 103, 4, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
}
JSON_SCHEDULE = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        yield from zip(*rows().tensors, strict=True)


def rows() -> TensorDataset:
    """Numbered samples: x, y, number."""
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.pow(2).sum(1, keepdim=True), torch.arange(SAMPLES))


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def objects_of(schedule: str, length: int) -> list[Any]:
    """Model, optimizer and scheduler of a script whose schedule has this length."""
    from accelerate.utils import DummyOptim, DummyScheduler

    model = net()
    if schedule == "json":
        optimizer = DummyOptim(model.parameters(), lr=0.02)
        return [model, optimizer, DummyScheduler(optimizer, total_num_steps=length, warmup_num_steps=3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    if schedule == "one_cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=length)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / length))
    return [model, optimizer, scheduler]


def reset() -> None:
    """Let another Accelerator begin in this process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def trained(prepared: Any, accelerator: Any, loader: Any, epochs: int) -> dict[str, Any]:
    """What a loop as in Accelerate's examples has seen: samples of each epoch, and the rate at each optimizer step."""
    model, optimizer, scheduler = prepared
    seen, rates = [], []
    for _ in range(epochs):
        seen.append([])
        for x, y, number in loader:
            seen[-1] += number.tolist()
            with accelerator.accumulate(model):
                rate = optimizer.param_groups[0]["lr"]
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(rate)
    return {"seen": seen, "rates": rates, "steps": model.global_steps}


def length_of(counted: str, loader: Any, accelerator: Any, accumulate: int) -> int:
    if counted == "epochs":  # as in Accelerate's examples: of the loader before it is prepared
        return EPOCHS * len(loader) // accumulate
    return 10 * accelerator.num_processes  # as in the scripts of transformers, with --max_train_steps


SCRIPTS = [
    ("lambda", "epochs", 2),
    ("one_cycle", "epochs", 1),
    ("json", "epochs", 1),
    ("lambda", "steps", 2),
    ("json", "steps", 1),
]


def plain_rates() -> list[list[float]]:
    """Under Accelerate alone, which on a CPU has to be told its ranks; a script for each of ``SCRIPTS``."""
    from accelerate import Accelerator, DeepSpeedPlugin

    from ds_pso.accelerate import see_the_particle
    from ds_pso.distributed.layout import Layout

    found = []
    for schedule, counted, accumulate in SCRIPTS:
        reset()
        config = CONFIG | (JSON_SCHEDULE if schedule == "json" else {})
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulate)
        see_the_particle(Layout(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 1))
        loader = DataLoader(rows(), batch_size=BATCH, shuffle=True, drop_last=True)
        objects = objects_of(schedule, length_of(counted, loader, accelerator, accumulate))
        *prepared, loader = accelerator.prepare(*objects, loader)
        found.append(trained(prepared, accelerator, loader, EPOCHS)["rates"])
    return found


def swarm_runs() -> list[dict[str, Any]]:
    """The same scripts in a swarm of two particles; and how their loaders see data."""
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso
    from ds_pso.accelerate import see_the_particle

    found, world = [], None
    for schedule, counted, accumulate in SCRIPTS:
        reset()
        config = (
            CONFIG | (JSON_SCHEDULE if schedule == "json" else {}) | {"swarm": {"particles": 2, "sync_interval": 3}}
        )
        swarm = ds_pso.init(config, world=world)
        world = swarm.world
        plugin = DeepSpeedPlugin(hf_ds_config=swarm.ds_config)
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulate)
        see_the_particle(world.layout)  # as on GPUs, where Accelerate does it before the script reads num_processes
        loader = DataLoader(rows(), batch_size=BATCH, shuffle=True, drop_last=True)
        objects = objects_of(schedule, length_of(counted, loader, accelerator, accumulate))
        *prepared, loader = swarm.prepare(accelerator, *objects, loader, schedule=counted)
        run = trained(prepared, accelerator, loader, EPOCHS)
        found.append(run | {"batch": prepared[0].train_micro_batch_size_per_gpu(), "syncs": swarm.totals.count})
    world.close()
    return found


@functools.cache
def plain(pool: Pool, world_size: int) -> list[list[float]]:
    ranks = pool.run(plain_rates, world_size=world_size, env=DEEPSPEED, timeout=120)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.mark.parametrize("size", slow_but([2], [1, 2]))
def test_rates_and_data_are_those_of_accelerate_alone(pool, size):
    """With a schedule by epochs, on all P x S ranks; with one by steps, on the S ranks of a particle."""
    ranks = pool.run(swarm_runs, world_size=2 * size, env=DEEPSPEED, timeout=120)
    for i, (_, counted, accumulate) in enumerate(SCRIPTS):
        runs = [rank[i] for rank in ranks]
        batches = SAMPLES // (2 * size * BATCH)
        steps = EPOCHS * -(-batches // accumulate)
        expected = plain(pool, 2 * size if counted == "epochs" else size)[i]
        assert len(set(expected)) > 3
        for run in runs:
            assert run["steps"] == len(run["rates"]) == steps
            assert run["rates"][: len(expected)] == pytest.approx(expected[:steps], rel=1e-9)
            assert run["batch"] == BATCH
            assert run["syncs"] == steps // 3
        if counted == "epochs":
            assert len(expected) == steps
        for epoch in range(EPOCHS):
            seen = [number for run in runs for number in run["seen"][epoch]]
            assert len(seen) == len(set(seen)) == batches * 2 * size * BATCH


# -- checkpoints ----------------------------------------------------------------------------

SAVED_AT = (1, 2)  # epoch, and micro batches in it, of 6


class Counter:
    """An object of the script's own, registered for checkpoints."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def train_and_save(folder: Path, resume: bool, how: str, particles: int) -> dict[str, Any]:
    """Two epochs with a checkpoint in the second, or from there; what was seen since then, and the weights at the end.

    ``how``: "named" by the script, "numbered" by Accelerate, or by "swarm.save".
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import ProjectConfiguration

    import ds_pso

    config = CONFIG | {"swarm": {"particles": particles, "sync_interval": 2, "sync_mode": "diloco"}}
    with ds_pso.init(config) as swarm:
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config),
            gradient_accumulation_steps=2,
            project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=how == "numbered"),
        )
        named = None if how == "numbered" else folder / "state"
        loader = DataLoader(rows(), batch_size=BATCH, shuffle=True)
        model, optimizer, scheduler = objects_of("lambda", EPOCHS * len(loader) // 2)
        model = torch.nn.Sequential(torch.nn.Dropout(0.2), model)
        model, loader, optimizer, scheduler = swarm.prepare(accelerator, model, loader, optimizer, scheduler)
        torch.manual_seed(swarm.world.layout.rank)
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        first_epoch, seen, losses = 0, [], []
        if resume:
            expected = SAVED_AT[0] * len(loader) + SAVED_AT[1]
            if how == "swarm.save":
                swarm.load(folder)
                counter.count = expected  # it holds nothing of the script's own
            else:
                accelerator.load_state(named)
                assert counter.count == expected
            first_epoch = SAVED_AT[0]
        for epoch in range(first_epoch, EPOCHS):
            skipped = SAVED_AT[1] if resume else 0  # as scripts resume that Accelerate alone restarts
            for index, (x, y, number) in enumerate(accelerator.skip_first_batches(loader, skipped), skipped):
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.mse_loss(model(x), y)
                    accelerator.backward(loss)
                    scheduler.step()
                counter.count += 1
                seen += number.tolist()
                losses.append(loss.item())
                if (epoch, index + 1) == SAVED_AT and not resume:
                    swarm.save(folder) if how == "swarm.save" else accelerator.save_state(named)
                    seen, losses = [], []
        if particles > 1:
            with pytest.raises(ds_pso.UnsupportedError, match=r"swarm\.export"):
                accelerator.save_model(model, folder / "model")
        state = swarm.session.synchronizer.parts.updater.state
        return {
            "seen": seen,
            "losses": losses,
            "count": counter.count,
            "rate": scheduler.get_last_lr(),
            "weights": [p.detach().numpy().copy() for p in model.parameters()],
            "rule": [value.numpy().copy() for kept in state for value in kept.values()],
            "random": torch.rand(3).tolist(),
            "syncs": swarm.last_sync.sync,
        }


@pytest.mark.parametrize(
    ("how", "particles"),
    slow_but(
        [("numbered", 2)], [(how, particles) for how in ("named", "numbered", "swarm.save") for particles in (1, 2)]
    ),
)
def test_a_run_goes_on_bit_for_bit(pool, tmp_path, how, particles):
    options = {"world_size": 2 * particles, "env": DEEPSPEED, "timeout": 120}
    whole = pool.run(train_and_save, tmp_path, False, how, particles, **options)
    if how != "swarm.save":
        found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("random_states_*.pkl"))
        folders = ["state" if how == "named" else "checkpoints/checkpoint_0"]
        if particles > 1:
            name = "state/particle_{}" if how == "named" else "particle_{}/checkpoints/checkpoint_0"
            folders = [name.format(i) for i in range(particles)]
        assert found == [f"{folder}/random_states_{j}.pkl" for folder in folders for j in range(2)]
        parts = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("swarm")}
        assert parts == set(folders), "the swarm's part is written once"
    resumed = pool.run(train_and_save, tmp_path, True, how, particles, **options)
    for before, after in zip(whole, resumed, strict=True):
        for key in ("weights", "rule"):
            for one, other in zip(before.pop(key), after.pop(key), strict=True):
                assert (one == other).all()
        assert before == after
    if particles > 1:
        assert whole[0]["losses"] != whole[2]["losses"], "each particle has a state of its own"


# -- evaluation, streams, and what is refused -----------------------------------------------


def evaluate_and_train_on_it() -> dict[str, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso

    config = CONFIG | {"swarm": {"particles": 2, "sync_interval": 2}}
    found = {}
    with ds_pso.init(config) as swarm:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        held_out = DataLoader(rows(), batch_size=BATCH + 1)
        model, optimizer, scheduler = objects_of("lambda", 10)
        stream = DataLoader(Stream(), batch_size=BATCH)
        # The held-out loader stands first, and is larger: it is not taken for the training data.
        held_out, stream, model, optimizer, scheduler = (
            *[accelerator_prepare(swarm, accelerator, held_out)],
            *swarm.prepare(accelerator, stream, model, optimizer, scheduler),
        )
        found["seen"] = []
        for x, y, number in stream:
            found["seen"] += number.tolist()
            accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
            scheduler.step()
        found["gathered"] = []
        with swarm.consensus(), torch.no_grad():
            for x, _, number in held_out:
                found["gathered"] += accelerator.gather_for_metrics(number).tolist()
                found.setdefault("outputs", []).extend(accelerator.gather_for_metrics(model(x)).flatten().tolist())
        found["batch"] = model.train_micro_batch_size_per_gpu()
        for x, y, _ in held_out:
            loss = torch.nn.functional.mse_loss(model(x), y)
            with pytest.raises(ds_pso.SwarmError, match="all particles would train on the same samples"):
                accelerator.backward(loss)
    return found


def accelerator_prepare(swarm: Any, accelerator: Any, loader: Any) -> Any:
    from ds_pso.accelerate import see_the_particle

    see_the_particle(swarm.world.layout)  # as on GPUs
    return accelerator.prepare(loader)


def test_evaluation_is_inside_the_particle_and_nobody_trains_on_it(pool):
    ranks = pool.run(evaluate_and_train_on_it, env=DEEPSPEED, timeout=120)
    for rank in ranks:
        assert rank["gathered"] == list(range(SAMPLES)), "each once, without what fills up the last batch"
        assert rank["outputs"] == ranks[0]["outputs"], "the consensus is one model"
        assert rank["batch"] == BATCH
    seen = sorted(number for rank in ranks for number in rank["seen"])
    assert seen == list(range(SAMPLES // (4 * BATCH) * 4 * BATCH))


def prepare_wrongly() -> dict[str, str]:
    """The message of each refusal, by name."""
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso

    found = {}
    with ds_pso.init(CONFIG | {"swarm": {"particles": 2}}) as swarm:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        model, optimizer, scheduler = objects_of("lambda", 10)
        data = rows()
        mixed = DataLoader(data, BATCH, sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES))
        plain, shuffled = DataLoader(data, BATCH), DataLoader(data, BATCH, shuffle=True)
        prepared = accelerator.prepare(DataLoader(data, BATCH))
        batches = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(range(SAMPLES), BATCH, True))
        wrong = {
            "no accelerator": (model, optimizer, shuffled),
            "a foreign object": (accelerator, model, optimizer, "loader"),
            "a list of tensors": (accelerator, model, optimizer, list(data)),
            "no model": (accelerator, optimizer, shuffled),
            "no optimizer": (accelerator, model, shuffled),
            "two schedulers": (accelerator, model, optimizer, scheduler, scheduler),
            "two loaders": (accelerator, model, optimizer, plain, DataLoader(data, BATCH)),
            "two shuffled": (accelerator, model, optimizer, shuffled, DataLoader(data, BATCH, shuffle=True)),
            "prepared": (accelerator, model, optimizer, prepared),
            "batch sampler": (accelerator, model, optimizer, batches),
        }
        for name, objects in wrong.items():
            with pytest.raises(ds_pso.SwarmError) as caught:
                swarm.prepare(*objects)
            assert caught.value.agreed
            found[name] = str(caught.value)
        with pytest.raises(ds_pso.ConfigError) as caught:
            swarm.prepare(accelerator, model, optimizer, schedule="epoch")
        found["schedule"] = str(caught.value)
        with pytest.raises(ds_pso.UnsupportedError) as caught:
            swarm.prepare(accelerator, model, optimizer, scheduler, mixed)
        found["sampler"] = str(caught.value)
    reset()
    batches = [
        {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": 1} for size in (BATCH, BATCH + 1)
    ]
    with ds_pso.init(CONFIG | {"swarm": {"particles": 2, "per_particle": batches}}) as swarm:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        shuffled = DataLoader(data, swarm.ds_config["train_micro_batch_size_per_gpu"], shuffle=True)
        with pytest.raises(ds_pso.ConfigError) as caught:
            swarm.prepare(accelerator, model, optimizer, scheduler, shuffled)
        found["unequal lengths"] = str(caught.value)
    reset()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    with ds_pso.init(CONFIG | {"swarm": {"particles": 2}}) as swarm:
        with pytest.raises(ds_pso.ConfigError) as caught:
            swarm.prepare(Accelerator(cpu=True), model, optimizer)
        found["no deepspeed"] = str(caught.value)
    return found


def test_what_is_wrong_is_named(pool):
    for found in pool.run(prepare_wrongly, world_size=2, env=DEEPSPEED):
        expected = {
            "no accelerator": "the first argument is a Sequential",
            "a foreign object": "was given a str",
            "a list of tensors": "was given a list",
            "no model": "given 0 models",
            "no optimizer": "given 0 optimizers: it needs one; where the JSON describes it, give accelerate.utils",
            "two schedulers": "given 2 schedulers",
            "two loaders": "given 2 loaders, of which 0 shuffle",
            "two shuffled": "given 2 loaders, of which 2 shuffle",
            "prepared": "was prepared before",
            "batch sampler": "has a batch sampler",
            "schedule": 'must be "epochs" or "steps"',
            "sampler": "has a WeightedRandomSampler",
            "unequal lengths": "the particles' loaders are not equally long",
            "no deepspeed": "start with accelerate launch --use_deepspeed",
        }
        for name, text in expected.items():
            assert text in found[name], name


def end_at_zero_early() -> list[str]:
    from accelerate import Accelerator, DeepSpeedPlugin

    import ds_pso

    with ds_pso.init(CONFIG | {"swarm": {"particles": 2}}) as swarm, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        loader = DataLoader(rows(), batch_size=BATCH, shuffle=True)
        objects = objects_of("lambda", 8 * accelerator.num_processes)
        *prepared, loader = swarm.prepare(accelerator, *objects, loader)
        trained(prepared, accelerator, loader, 1)
    return [str(warning.message) for warning in caught if "schedule has ended" in str(warning.message)]


def test_a_schedule_that_ends_before_training_is_said_once(pool):
    first, second = pool.run(end_at_zero_early, world_size=2, env=DEEPSPEED)
    assert len(first) == 1
    assert 'schedule="steps"' in first[0]
    assert second == []


def run_page(folder: Path, script: str) -> None:
    os.chdir(folder)
    Path(f"script_{os.environ['LOCAL_RANK']}.py").write_text(script, encoding="utf-8")
    runpy.run_path(f"script_{os.environ['LOCAL_RANK']}.py", run_name="__main__")


@pytest.mark.slow
def test_the_script_of_the_page(pool, tmp_path):
    page = (Path(__file__).parents[2] / "docs/accelerate.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    pool.run(run_page, tmp_path, script.replace("print(f", "open('printed', 'w').write(f"), timeout=120)
    said = (tmp_path / "printed").read_text()
    assert said.startswith("2 particles x 2 ranks, local_sgd every 8 steps: held-out loss ")
    assert float(said.rpartition(" ")[2]) < 1  # 8 is the variance of the targets
    assert (tmp_path / "out/model/model.safetensors").is_file()
    assert (tmp_path / "out/state/particle_1/swarm").is_dir()
