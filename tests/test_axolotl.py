"""Axolotl's plugin: a job as Axolotl runs one, with a stand-in for its base class and the order of its calls."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from test_docs import blocks, page
from test_hf_trainer import CONFIG, Numbered, P, S, changed, llama, same, weights

from ds_pso.errors import ConfigError, UnsupportedError
from ds_pso.metrics.log import read_metrics

EPOCHS = 2
PLUGIN = "ds_pso.hf_trainer.axolotl.SwarmPlugin"
HOOKS = {  # of Axolotl's BasePlugin, of those that are used here
    "register": ["cfg"],
    "add_callbacks_post_trainer": ["cfg", "trainer"],
    "post_train_unload": ["cfg"],
}


class Config(dict):
    """Like Axolotl's DictDefault: keys are attributes, and what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def stand_in() -> None:
    """Modules under Axolotl's names, with a base class whose hooks do nothing."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {name: lambda self, *_: None for name in HOOKS})  # type: ignore[attr-defined]
    modules = {"axolotl": types.ModuleType("axolotl"), "axolotl.integrations": types.ModuleType("axolotl.integrations")}
    sys.modules.update({**modules, base.__name__: base})


def load_plugin(name: str) -> Any:
    """As Axolotl's PluginManager loads what ``plugins:`` names."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)()


# -- a whole training -----------------------------------------------------------------------


def run_as_axolotl_does(folder: Path, config: str | dict[str, Any]) -> dict[str, Any]:
    """``load_cfg``, ``setup_trainer``, ``train`` and ``do_train``, as far as a plugin sees them."""
    import deepspeed
    import torch
    from transformers import Trainer, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    stand_in()
    launched = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
    cfg = Config(plugins=[PLUGIN], deepspeed=config, output_dir=str(folder / "out"))
    plugin = load_plugin(cfg.plugins[0])
    plugin.register(cfg)
    cfg.world_size = int(os.environ["WORLD_SIZE"])  # Axolotl multiplies the batch size by it
    cfg = Config(json.loads(json.dumps(cfg)))  # its validation makes another object

    data = Numbered(64)
    counted = len(data) * EPOCHS // (4 * cfg.world_size)
    args = TrainingArguments(
        output_dir=cfg.output_dir,
        deepspeed=cfg.deepspeed,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        num_train_epochs=EPOCHS,
        max_steps=counted,
        warmup_steps=counted // 4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(int(launched["RANK"]))  # the swarm makes them alike
    trainer = Trainer(llama(), args, train_dataset=data)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    trainer.create_model_card(model_name="out")
    found = {
        "asked": data.asked,
        "weights": weights(trainer.model),
        "world_size": cfg.world_size,
        "swarm": cfg.deepspeed.get("swarm"),
        "steps": trainer.state.max_steps,
        "warmup_steps": trainer.args.warmup_steps,
        "output_dir": trainer.args.output_dir,
    }
    plugin.post_train_unload(cfg)
    return found | {"given_back": launched == {name: os.environ[name] for name in launched}}


@pytest.mark.parametrize("as_path", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["path", "mapping"])
def test_a_job_is_a_particle(pool: Pool, tmp_path: Path, as_path: bool) -> None:
    (tmp_path / "ds_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    given: Any = str(tmp_path / "ds_config.json") if as_path else CONFIG
    ranks = pool.run(run_as_axolotl_does, tmp_path, given, timeout=120)
    for epoch in (slice(0, 16), slice(16, 32)):
        assert sorted(index for rank in ranks for index in rank["asked"][epoch]) == list(range(64))
    for rank in ranks:
        same(rank["weights"], ranks[0]["weights"], rtol=0)
        assert (rank["world_size"], rank["swarm"], rank["given_back"]) == (S, None, True)
        assert rank["steps"] == 64 * EPOCHS // (4 * P * S)
        assert rank["warmup_steps"] == rank["steps"] // 4
    records = [record for record in read_metrics(tmp_path / "out/metrics.jsonl") if record["event"] == "sync"]
    assert [record["step"] for record in records] == [4, 8]
    assert [Path(rank["output_dir"]).name for rank in ranks] == ["out", "out", "particle_1", "particle_1"]


# -- what is refused ------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin in this process, with the stand-in; later tests import it anew."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "ds_pso.hf_trainer.axolotl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stand_in()
    del sys.modules["ds_pso.hf_trainer.axolotl"]
    found = load_plugin(PLUGIN)
    monkeypatch.delitem(sys.modules, "ds_pso.hf_trainer.axolotl")
    return found


@pytest.mark.parametrize(
    ("cfg", "error", "key"),
    [
        (Config(), ConfigError, "deepspeed"),
        (Config(deepspeed=CONFIG, sample_packing=True), UnsupportedError, "sample_packing"),
        (Config(deepspeed=changed(CONFIG, wyre="int4")), ConfigError, "wyre"),
    ],
    ids=["no DeepSpeed", "packed samples", "a wrong key"],
)
def test_what_cannot_be_is_said_before_any_rank_is_waited_for(plugin: Any, cfg: Config, error: Any, key: str) -> None:
    with pytest.raises(error, match=key):
        plugin.register(cfg)
    plugin.post_train_unload(cfg)


@pytest.mark.parametrize(("size", "local_rank", "refused"), [(1, "0", False), (1, "1", True), (2, "1", False)])
def test_particles_of_one_rank_need_a_machine_each(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, size: int, local_rank: str, refused: bool
) -> None:
    world = types.SimpleNamespace(
        layout=types.SimpleNamespace(particle_size=size),
        coordinator=types.SimpleNamespace(agree=lambda doing: contextlib.nullcontext()),
    )
    swarm = types.SimpleNamespace(world=world, ds_config={}, close=lambda: None)
    monkeypatch.setitem(type(plugin).register.__globals__, "init", lambda *_, **__: swarm)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UnsupportedError, match="first GPU") if refused else contextlib.nullcontext():
        plugin.register(Config(deepspeed=CONFIG))


@pytest.mark.parametrize(
    ("particles", "cfg", "counted", "warmup"),
    [
        (1, Config(), 96, 12),
        (4, Config(), -1, 3),
        (4, Config(max_steps=96), 96, 12),
        (4, Config(warmup_steps=12), -1, 12),
    ],
    ids=["one particle", "four", "steps given", "warm-up given"],
)
def test_steps_that_axolotl_counted_are_counted_anew(
    plugin: Any, particles: int, cfg: Config, counted: int, warmup: int
) -> None:
    args = types.SimpleNamespace(max_steps=96, warmup_steps=12)
    count = type(plugin).register.__globals__["_count_steps"]
    count(particles, cfg, types.SimpleNamespace(args=args))
    assert (args.max_steps, args.warmup_steps) == (counted, warmup)


def test_preprocessing_joins_no_swarm(plugin: Any) -> None:
    cfg = Config(deepspeed="nowhere.json", is_preprocess=True)
    plugin.register(cfg)
    plugin.post_train_unload(cfg)
    assert cfg.deepspeed == "nowhere.json"


# -- the interface --------------------------------------------------------------------------


def test_the_hooks_are_those_of_the_stand_in(plugin: Any) -> None:
    own = {name: value for name, value in vars(type(plugin)).items() if not name.startswith("_")}
    assert {name: list(inspect.signature(value).parameters)[1:] for name, value in own.items()} == HOOKS


def test_the_hooks_are_those_of_axolotl() -> None:
    """Where it is installed."""
    base = pytest.importorskip("axolotl.integrations.base").BasePlugin
    for name, parameters in HOOKS.items():
        assert list(inspect.signature(getattr(base, name)).parameters)[1:] == parameters


def test_the_page_names_the_plugin() -> None:
    (yaml,) = blocks(page("docs/axolotl.md"), "yaml")
    assert re.search(rf"^plugins:\n  - {re.escape(PLUGIN)}$", yaml, flags=re.MULTILINE)
    assert re.search(r"^deepspeed: ds_config.json$", yaml, flags=re.MULTILINE)
