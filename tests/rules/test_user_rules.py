"""Rules of the user's own, named in the JSON as ``my_module:MyRule``: found, configured, followed, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.jobs import Case, build_engine, config, swarm_of, train, working_weights
from pool import Pool

import ds_pso
from ds_pso.config.load import load_config
from ds_pso.config.presets import sync_modes
from ds_pso.config.schema import SwarmConfig
from ds_pso.errors import ConfigError
from ds_pso.rules import Rule, SyncPoint, find_rule
from ds_pso.swarm import Swarm

ROOT = Path(__file__).parents[2]
RECIPES = str(ROOT / "recipes")
OWN = "own_rule:OwnRule"


@pytest.fixture(autouse=True)
def _no_module_stays() -> Iterator[None]:
    """Each test imports its modules anew."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("own_rule", "users_")):
            del sys.modules[name]


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.delitem(sys.modules, "own_rule", raising=False)


Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Puts a module of this name and source where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")

    return write


def load(section: dict[str, Any]) -> SwarmConfig:
    return load_config({"swarm": section})[1]


def message_of(section: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- found, with its options ------------------------------------------------------------------


@pytest.mark.usefixtures("recipes")
def test_it_is_found_on_the_path_and_gets_its_options_and_the_seed():
    rule = load({"sync_mode": OWN, "seed": 7, OWN: {"part": 0.25}}).build_rule()
    assert isinstance(rule, Rule)
    assert type(rule) is sys.modules["own_rule"].OwnRule
    assert (rule.options.part, rule.seed) == (0.25, 7)
    assert load({"sync_mode": OWN}).build_rule().options.part == 0.5, "without a subsection it has its defaults"


def test_it_is_found_inside_a_package(write: Write):
    write("users_package/__init__.py", "")
    write("users_package/rules.py", "from ds_pso.rules.local_sgd import LocalSGD\nclass Mine(LocalSGD): pass\n")
    assert find_rule("users_package.rules:Mine").__name__ == "Mine"


@pytest.mark.usefixtures("recipes")
@pytest.mark.parametrize("section", [{}, {OWN: {"part": 0.125}}, {OWN: {"part": 1}, "pso": {"social": 2.0}}])
def test_resolved_reads_back_as_the_same_rule(section, tmp_path):
    first = load({"sync_mode": OWN, "particles": 3, **section})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"swarm": first.resolved()}), encoding="utf-8")
    again = load_config(path)[1]
    assert first.resolved()[OWN] == {"part": section.get(OWN, {"part": 0.5})["part"]}
    assert again.resolved() == first.resolved()
    assert again.rule_options == first.rule_options


@pytest.mark.usefixtures("recipes")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": 0}, "swarm.own_rule:OwnRule.part = 0: must be greater than 0"),
        ({"part": 1.5}, "swarm.own_rule:OwnRule.part = 1.5: must be less than or equal to 1"),
        ({"part": "half"}, "swarm.own_rule:OwnRule.part = 'half': must be a valid number"),
        ({"prat": 1}, 'swarm.own_rule:OwnRule.prat: unknown key; did you mean "part"?'),
        (5, "swarm.own_rule:OwnRule = 5: must be an object"),
        (None, "swarm.own_rule:OwnRule = None: must be an object"),
    ],
)
def test_bad_options_are_named(options, said):
    assert message_of({"sync_mode": OWN, OWN: options}) == f"config: {said}"


@pytest.mark.usefixtures("recipes")
def test_options_of_a_rule_that_is_not_the_active_one_are_an_unknown_key():
    """Nothing is imported but what sync_mode names."""
    assert "swarm.own_rule:OwnRule: unknown key" in message_of({"sync_mode": "pso", OWN: {"part": 0.5}})
    assert "own_rule" not in sys.modules


# -- refused ----------------------------------------------------------------------------------

CANNOT_IMPORT = "must name a module that can be imported"
NO_RULE = "must name a subclass of ds_pso.rules.Rule, and users_module has none called "
USERS_MODULE = """
    from dataclasses import dataclass
    from pydantic import BaseModel
    from ds_pso.rules import Rule, RuleConfig
    from ds_pso.rules.local_sgd import LocalSGD

    rule = LocalSGD(RuleConfig())

    def function(): pass

    class NotARule: pass

    class NoUpdate(Rule):
        def plan(self, sync, memory): pass

    class Nothing(Rule): pass

    class OtherConfig(LocalSGD):
        class Config(BaseModel): pass

    class InstanceAsConfig(LocalSGD):
        Config = RuleConfig()

    class Demanding(LocalSGD):
        class Config(RuleConfig):
            size: float

    class OwnState(LocalSGD):
        def init_state(self, x): return {"x": x}

    class Good(LocalSGD): pass
"""


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("users_module", f"must be one of {', '.join(sync_modes())}, or your own as my_module:MyRule"),
        ("users_missing:Rule", f"{CANNOT_IMPORT} (ModuleNotFoundError: No module named 'users_missing'); is it"),
        ("users_module.deeper:Rule", f"{CANNOT_IMPORT} (ModuleNotFoundError: "),
        ("users_raises:Rule", f"{CANNOT_IMPORT} (ZeroDivisionError: division by zero); is it installed, or its folder"),
        ("users_broken:Rule", f"{CANNOT_IMPORT} (SyntaxError: "),
        ("users_exits:Rule", f"{CANNOT_IMPORT} (SystemExit: 3); is it"),
        (":Good", f"{CANNOT_IMPORT} (ValueError: Empty module name)"),
        ("..users_module:Good", f"{CANNOT_IMPORT} (TypeError: "),
        ("users_module:", NO_RULE),
        ("users_module:Missing", f"{NO_RULE}Missing"),
        ("users_module:Good:Good", f"{NO_RULE}Good:Good"),
        ("users_module:function", f"{NO_RULE}function"),
        ("users_module:rule", f"{NO_RULE}rule"),
        ("users_module:NotARule", f"{NO_RULE}NotARule"),
        ("users_module:Rule", "must name a complete rule, and Rule does not define plan and update"),
        ("users_module:NoUpdate", "must name a complete rule, and NoUpdate does not define update"),
        ("users_module:Nothing", "must name a complete rule, and Nothing does not define plan and update"),
        ("users_module:OwnState", "must name a rule that lists its state in initial_state; OwnState overrides init"),
        ("users_module:OtherConfig", "must name a rule whose Config is a ds_pso.rules.RuleConfig, and that of Other"),
        ("users_module:InstanceAsConfig", "must name a rule whose Config is a ds_pso.rules.RuleConfig, and that of I"),
    ],
)
@pytest.mark.parametrize("with_options", [False, True], ids=["alone", "with options"])
def test_what_is_no_rule_is_refused_with_the_reason(write: Write, mode: str, said: str, with_options: bool):
    write("users_module.py", USERS_MODULE)
    write("users_raises.py", "1 / 0")
    write("users_broken.py", "class Rule(:")
    write("users_exits.py", "raise SystemExit(3)")
    section: dict[str, Any] = {"sync_mode": mode} | ({mode: {}} if with_options and ":" in mode else {})
    assert message_of(section).startswith(f"config: swarm.sync_mode = {mode!r}: {said}".rstrip())
    assert load({"sync_mode": "users_module:Good"}).build_rule() is not None, "others are still found"


@pytest.mark.parametrize("options", [{}, {"users_module:Demanding": {}}], ids=["alone", "with options"])
def test_an_option_without_a_default_must_be_given(write: Write, options: dict[str, Any]):
    write("users_module.py", USERS_MODULE)
    said = message_of({"sync_mode": "users_module:Demanding", **options})
    assert said == "config: swarm.users_module:Demanding.size: is missing, and has no default; add it"


# -- the rule of the recipe -------------------------------------------------------------------


def own_rule(seed: int = 0, **options: Any) -> Rule:
    return find_rule(OWN)(find_rule(OWN).Config(**options), seed=seed)


def peers_at(rule: Rule, index: int, alive: tuple[bool, ...]) -> tuple[int, ...]:
    return rule.plan(SyncPoint(index, (0.0,) * len(alive), alive), {}).sources


@pytest.mark.usefixtures("recipes")
def test_everybody_follows_another_that_lives():
    alive = (True, False, True, True)
    seen: set[tuple[int, int]] = set()
    for index in range(60):
        seen |= set(enumerate(peers_at(own_rule(), index, alive)))
    assert seen == {(i, j) for i in range(4) for j in range(4) if alive[j] and j != i}
    assert peers_at(own_rule(), 0, (False, True)) == (1, 1), "the only one alive has nobody but itself"


@pytest.mark.usefixtures("recipes")
def test_whom_they_follow_depends_on_seed_and_sync_point_alone():
    draws = {(seed, index): peers_at(own_rule(seed), index, (True,) * 8) for seed in (0, 1) for index in range(4)}
    assert len(set(draws.values())) == len(draws)
    for (seed, index), sources in draws.items():
        assert peers_at(own_rule(seed), index, (True,) * 8) == sources


def found_on_the_path() -> None:
    if RECIPES not in sys.path:
        sys.path.insert(0, RECIPES)


def gossip(case: Case, sync_points: int, dead: dict[int, int], folder: Path) -> list[Any]:
    """Particles driven apart sync, some of them dead; of each what it had before, after, and who followed whom."""
    found_on_the_path()
    path = folder / "config.json"
    path.write_text(json.dumps(config(case, 1)), encoding="utf-8")

    def life(swarm: Swarm) -> list[Any]:
        records: list[dict[str, Any]] = []
        swarm.on_sync(lambda record: records.append(record.to_json()))
        swarm.attach(build_engine(case, swarm.ds_config))
        tensors = swarm.session.synchronizer.parts.shards.tensors
        noise = torch.Generator().manual_seed(swarm.particle)
        history = []
        for sync_point in range(sync_points):
            for x in tensors:
                x.add_(torch.randn(x.shape, generator=noise))
            if dead.get(sync_point) == swarm.particle:
                tensors[0][0] = torch.nan
            before = torch.cat(list(tensors)).numpy()
            swarm.sync()
            history.append((before, torch.cat(list(tensors)).numpy(), records[-1]["sources"]))
        return history

    return ds_pso.simulate(path, life)


def test_a_simulation_follows_its_equation(pool: Pool, tmp_path: Path):
    sync_points, dead, part = 6, {2: 0, 4: 3}, 0.25
    case = Case(stage=0, particles=4, sync_mode=OWN, options={"part": part}, swarm={"seed": 3})
    (histories,) = pool.run(gossip, case, sync_points, dead, tmp_path, world_size=1)
    for sync_point in range(sync_points):
        before = np.stack([history[sync_point][0] for history in histories]).astype(np.float64)
        after = np.stack([history[sync_point][1] for history in histories])
        sources = histories[0][sync_point][2]
        assert len(set(sources)) > 1, "then this is no test of sending from each to each"
        expected = np.empty_like(before)
        for i, j in enumerate(sources):
            expected[i] = before[j] if dead.get(sync_point) == i else (1 - part) * before[i] + part * before[j]
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        assert all(history[sync_point][2] == sources for history in histories)


def simulated(case: Case) -> list[Any]:
    found_on_the_path()  # a forked process has read PYTHONPATH before the test could set it

    def life(swarm: Swarm) -> Any:
        engine = build_engine(case, swarm.ds_config)
        swarm.attach(engine)
        train(case, engine, where=(swarm.particle, 0, 1))
        return working_weights(engine)

    return ds_pso.simulate(config(case, 1), life)


def for_real(case: Case) -> Any:
    found_on_the_path()
    with swarm_of(case) as (_, engine):
        train(case, engine)
        return working_weights(engine)


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (3, 2)])
def test_real_ranks_do_as_simulated_ones(pool: Pool, stage: int, size: int):
    case = Case(stage=0, sync_mode=OWN, interval=1, options={"part": 0.3}, seed=5)
    (expected,) = pool.run(simulated, case, world_size=1)
    real = pool.run(for_real, replace(case, stage=stage), world_size=2 * size)
    for rank, weights in enumerate(real):
        for name, value in weights.items():
            np.testing.assert_allclose(value, expected[rank // size][name], rtol=2e-5, atol=2e-6, err_msg=name)
    assert any(np.any(real[0][name] != real[-1][name]) for name in real[0]), "a part of the way, not all of it"


@pytest.mark.slow
def test_it_starts_as_its_docstring_says(tmp_path: Path):
    """On PYTHONPATH, from a folder and with a script that know nothing of it."""
    section = {"particles": 3, "sync_mode": OWN, "sync_interval": 2, OWN: {"part": 0.5}}
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    (tmp_path / "own.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 4, "optimizer": optimizer, "swarm": section})
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
            import sys
            import deepspeed
            import torch
            import ds_pso

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
            with ds_pso.init(sys.argv[1], run_dir="run") as swarm:
                model = torch.nn.Linear(2, 1)
                engine, *_ = deepspeed.initialize(model=model, config=swarm.ds_config)
                swarm.attach(engine)
                for _ in range(4):
                    engine.backward(engine(torch.randn(4, 2)).square().mean())
                    engine.step()
        """)
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("ds-pso"), "simulate", "script.py", "own.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": RECIPES, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["event"], record["step"]) for record in records] == [("start", 0), ("sync", 2), ("sync", 4)]
    for record in records[1:]:
        assert all(source != i for i, source in enumerate(record["sources"]))
