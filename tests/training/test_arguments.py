"""The command line of train.py: what it takes, and what it says when it does not."""

import json
from pathlib import Path

import pytest

from ds_pso.config.load import load_config
from ds_pso.errors import ConfigError
from ds_pso.training.arguments import fill_auto, parse_arguments, parse_llama, read_deepspeed_config

REPO = Path(__file__).parents[2]


def test_defaults_are_the_quick_start():
    arguments = parse_arguments([])
    assert (arguments.model, arguments.dataset, arguments.resume) == ("llama:4x128", "python", False)
    assert arguments.deepspeed_config is None


def test_the_deepspeed_launchers_own_argument_is_accepted():
    assert parse_arguments(["--local_rank=3", "--steps", "7"]).steps == 7


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--step", "3"], "--step"),
        (["--steps", "0"], "--steps"),
        (["--steps", "-1"], "--steps"),
        (["--steps", "1.5"], "--steps"),
        (["--seq_length", "long"], "--seq_length"),
        (["--eval_every", "0"], "--eval_every"),
        (["--seed", "x"], "--seed"),
        (["--reshape"], "--reshape"),
        (["--model", "llama:0x64"], "llama:0x64"),
        (["--model", "llama:2x65"], "llama:2x65"),
        (["--model", "llama:2"], "llama:2"),
    ],
)
def test_a_wrong_argument_is_named(argv, named):
    with pytest.raises(ConfigError, match=named):
        parse_arguments(argv)


def test_llama_size():
    assert parse_llama("llama:12x768") == (12, 768)


def test_the_built_in_config_is_the_quick_starts():
    example = json.loads((REPO / "ds_config_examples/zero2_slow_network.json").read_text())
    assert read_deepspeed_config(None, 4) == example


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_the_built_in_config_fits_any_number_of_ranks(world_size):
    _, swarm = load_config(read_deepspeed_config(None, world_size))
    assert world_size % swarm.particles == 0


def test_auto_takes_the_steps_from_the_command_line():
    config = {"scheduler": {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 5}}}
    fill_auto(config, 77)
    assert config["scheduler"]["params"] == {"total_num_steps": 77, "warmup_num_steps": 5}


@pytest.mark.parametrize(
    "config", [{"train_micro_batch_size_per_gpu": "auto"}, {"scheduler": {"params": {"warmup_max_lr": "auto"}}}]
)
def test_an_auto_that_nobody_can_fill_is_named(config):
    with pytest.raises(ConfigError, match="auto"):
        fill_auto(config, 77)
