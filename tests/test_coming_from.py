"""The page for those who come from other systems, against ds_pso, DeepSpeed and torchft: every key it names is one."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from pydantic import BaseModel
from test_docs import blocks, page
from test_snippets import part_of

import ds_pso
from ds_pso.cli import main as cli
from ds_pso.comm.compression import bytes_per_element, wire_options
from ds_pso.config.load import load_config
from ds_pso.config.schema import SwarmConfig
from ds_pso.rules import RULES

PAGE = page("docs/coming-from.md")
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
OF_DEEPSPEED = {
    *("optimizer", "bf16.enabled", "zero_optimization.stage", "gradient_accumulation_steps"),
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
}


def table(section: str) -> list[tuple[str, str]]:
    """The first two cells of each row."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|.*\|$", SECTIONS[section], flags=re.MULTILINE)
    return [row for row in rows[1:] if "---" not in row[0]]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


OURS = [(section, name) for section in SECTIONS for _, cell in table(section) for name in names_in(cell)]


# -- our side -------------------------------------------------------------------------------


def subsection(model: type[BaseModel], key: str) -> type[BaseModel]:
    classes = {name: rule.Config for name, rule in RULES.items()} | wire_options()
    return classes[key] if key in classes else model.model_fields[key].annotation


def check_key(path: list[str], value: str | None) -> None:
    *above, key = path
    model: type[BaseModel] = SwarmConfig
    for name in above:
        model = subsection(model, name)
    assert key in model.model_fields
    if value is not None:
        given = json.loads(value)
        for name in reversed(path):
            given = {name: given}
        SwarmConfig.model_validate(given)  # by itself: whether it goes with the defaults is another matter


def check_call(name: str, parameter: str | None) -> None:
    call = getattr(ds_pso.Swarm, name)
    assert parameter is None or parameter in inspect.signature(call).parameters


@pytest.mark.parametrize(("section", "name"), OURS)
def test_what_takes_their_place_is_ours(section: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.startswith("ds-pso launch "):
        with pytest.raises(SystemExit):
            cli._parser().parse_args(["launch", "--help"])
        assert re.search(rf"{name.split()[-1]}\b", capsys.readouterr().out)
        return
    call = re.fullmatch(r"swarm\.(\w+)(?:\((\w+)=\w+\))?", name)
    if call and hasattr(ds_pso.Swarm, call[1]):
        check_call(call[1], call[2])
        return
    key = re.fullmatch(r"swarm((?:\.\w+)+)(?: = (.+))?", name)
    if key:
        check_key(key[1].split(".")[1:], key[2])
        return
    assert name in OF_DEEPSPEED


def test_a_key_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        check_key(["sync_every"], None)
    with pytest.raises(AssertionError):
        check_key(["diloco", "outer_rate"], None)
    with pytest.raises(ValueError, match="int3"):
        check_key(["wire"], '"int3"')


@pytest.mark.parametrize("section", [name for name in SECTIONS if table(name)])
def test_each_row_names_a_key_or_says_that_there_is_none(section: str) -> None:
    for theirs, ours in table(section):
        assert theirs.strip()
        assert ours == "-" or names_in(ours), theirs


# -- the changes ----------------------------------------------------------------------------


def changes() -> dict[str, str]:
    """The diff of each section that has one."""
    return {name: blocks(text, "diff")[0] for name, text in SECTIONS.items() if blocks(text, "diff")}


def test_the_configs_afterwards_are_valid() -> None:
    """test_snippets.py trains with them."""
    found = {name: load_config(json.loads(part_of(diff, "+")))[1] for name, diff in changes().items()}
    assert len(found) == 4
    assert found["Elastic training"].transport == "elastic"
    assert found["torchft"].rule_options is not None
    assert found["torchft"].rule_options.model_dump() == {"outer_lr": 0.7, "outer_momentum": 0.9, "merge": "mean"}


@pytest.mark.parametrize("section", ["MiCS", "Elastic training"])
def test_deepspeed_refuses_the_configs_before(section: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    with pytest.raises(DeepSpeedConfigError, match="removed"):
        DeepSpeedConfig(json.loads(part_of(changes()[section], "-")))


def test_deepspeed_knows_none_of_the_optimizers() -> None:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    before = json.loads(part_of(changes()["1-bit Adam"], "-"))
    names = [before["optimizer"]["type"], *(name.strip('"') for name in names_in(table("1-bit Adam")[0][0])[1:])]
    assert names == ["OneBitAdam", "OneBitLamb", "ZeroOneAdam"]
    for name in names:
        assert name.lower() not in DEEPSPEED_OPTIMIZERS
        assert not hasattr(torch.optim, name)


def test_the_keys_that_deepspeed_refuses_are_those_that_the_page_lists() -> None:
    from deepspeed.runtime import config

    refused = {**config._REMOVED_TOP_LEVEL_CONFIG_KEYS, **config._REMOVED_ZERO_CONFIG_KEYS}
    sentence = re.search(r"refuses the keys (.+?),\s+and knows", PAGE, flags=re.DOTALL)
    assert sentence
    named = names_in(sentence[1])
    assert len(named) == 4
    assert set(named) <= set(refused)


# -- their side -----------------------------------------------------------------------------


def test_the_names_of_torchft_are_its_own_and_all_are_there() -> None:
    local_sgd = pytest.importorskip("torchft.local_sgd")
    manager = pytest.importorskip("torchft.manager")
    classes = [local_sgd.LocalSGD, local_sgd.DiLoCo, manager.Manager]
    arguments = {name for kind in classes for name in inspect.signature(kind).parameters}
    named = {name for theirs, _ in table("torchft") for name in names_in(theirs)}
    others = {"LocalSGD", "DiLoCo", "TORCHFT_LIGHTHOUSE"}
    assert named - others <= arguments
    assert arguments - named == {"manager", "model", "pg"}, "what the training loop makes"
    assert "TORCHFT_LIGHTHOUSE" in inspect.getsource(manager)


def test_the_bytes_against_1_bit_adam() -> None:
    """Two phases of one bit at every step, and of int4 every four: in bytes per parameter, times (P - 1) / P."""
    assert f"{2 * bytes_per_element('int4'):.2f} M / 4 and 2 M / 8 bytes" in PAGE
    assert 2 * bytes_per_element("int4") / 4 == pytest.approx(2 / 8, rel=0.05)
