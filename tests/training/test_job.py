"""The main job on real ranks: every example config, resuming, and what it says when it cannot run."""

import contextlib
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from variants import slow_but

from ds_pso.metrics.log import read_metrics

REPO = Path(__file__).parents[2]
# The elastic one needs ds-pso launch: see faults/test_launch.py.
EXAMPLES = sorted(path.name for path in (REPO / "ds_config_examples").glob("*.json") if "elastic" not in path.name)


def run_main(argv):
    """Exit code, standard output and standard error of one rank."""
    from ds_pso.training.job import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    rng = random.Random(0)
    words = ["swarm", "particle", "shard", "velocity", "inertia", "fitness", "loss", "peer"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(1500)))
    return path


@pytest.fixture
def tiny(text_file, tmp_path):
    """Arguments of a job that takes seconds."""

    def arguments(config=None, steps=34, output_dir="run", **others):
        given = {
            "deepspeed_config": config,
            "model": "llama:1x32",
            "dataset": text_file,
            "steps": steps,
            "seq_length": 16,
            "eval_every": 17,
            "output_dir": tmp_path / output_dir,
            **others,
        }
        return [str(item) for key, value in given.items() if value is not None for item in (f"--{key}", value)]

    return arguments


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"zero_optimization": {"stage": "x"}}, "deepspeed.initialize: ValidationError: 1 validation error"),
        pytest.param({"zero_optimization": 3}, "deepspeed.initialize: ", marks=pytest.mark.slow),
        pytest.param({"scheduler": "WarmupLR"}, "deepspeed.initialize: ", marks=pytest.mark.slow),
        (
            {"scheduler": {"type": "WarmupHoldDecayLR", "params": {"total_num_steps": 9, "decay_ratio": "x"}}},
            "decay_ratio",
        ),
    ],
    ids=["stage", "no section", "no scheduler", "of ours"],
)
def test_what_deepspeed_refuses_is_one_line(pool, tiny, tmp_path, section, said):
    path = tmp_path / "config.json"
    good = json.loads((REPO / "ds_config_examples" / "zero2_swarm.json").read_text())
    path.write_text(json.dumps(good | section))
    results = pool.run(run_main, tiny(path), timeout=120)
    for code, _, err in results:
        assert code == 1
        assert "Traceback" not in err
    (error,) = [line for line in results[0][2].splitlines() if line.startswith("ds_pso: error: ")]
    assert said in error


def check_run(folder, num_particles):
    """A finished run: all files there, the exported model opens, the loss went down."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in (
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "report.html",
        "checkpoints/latest",
        "model/model.safetensors",
    ):
        assert (folder / name).exists(), name
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = AutoTokenizer.from_pretrained(folder / "model")("swarm particle", return_tensors="pt").input_ids
    assert torch.isfinite(model(tokens).logits).all()
    records = read_metrics(folder / "metrics.jsonl")
    held_out = [record["losses"] for record in records if record["event"] == "held_out"]
    assert len(held_out[0]) == num_particles
    assert max(held_out[-1]) < min(held_out[0]) - 0.3
    return records


# Of what others show, here or in tests of the same sync mode.
SHOWN = ("zero3_local_sgd.json",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in SHOWN)) for name in EXAMPLES],
)
def test_every_example_config_trains(pool, tiny, tmp_path, name):
    config = json.loads((REPO / "ds_config_examples" / name).read_text())
    results = pool.run(run_main, tiny(REPO / "ds_config_examples" / name), env={"LOCAL_WORLD_SIZE": "2"}, timeout=120)
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    particles = config["swarm"]["particles"]
    num_particles = 1 if config["swarm"]["sync_mode"] == "allreduce" else 2 if particles == "node" else particles
    records = check_run(tmp_path / "run", num_particles)
    syncs = [record for record in records if record["event"] == "sync"]
    if config["swarm"]["sync_mode"] == "delayed":  # whose interval adapts, and ends where training does
        assert (syncs[0]["step"], syncs[-1]["step"]) == (8 + 4, 34)
    else:
        turns = config["swarm"]["fragments"] if config["swarm"].get("streaming") else 1
        spacing = config["swarm"]["sync_interval"] // turns
        assert len(syncs) == (0 if num_particles == 1 else 34 // spacing)
    assert all(all(sync["alive"]) for sync in syncs)
    output = results[0][1]
    assert "Held-out loss" in output
    assert ("Exchanged between particles" in output) == (num_particles > 1)
    assert all(out == "" for _, out, _ in results[1:]), "only the leader prints"


@pytest.mark.parametrize("world_size", slow_but([3], [1, 2, 3]))
def test_with_nothing_but_defaults_any_number_of_ranks_trains(pool, tiny, tmp_path, world_size):
    results = pool.run(run_main, tiny(), world_size=world_size, timeout=120)
    assert [code for code, _, _ in results] == [0] * world_size, results
    check_run(tmp_path / "run", {1: 1, 2: 2, 3: 3}[world_size])


def run_main_and_be_asked(argv):
    """Ctrl-C for one rank after step 8."""
    from ds_pso.swarm import Swarm

    real = Swarm.should_stop

    def should_stop(swarm):
        if swarm.world.layout.rank == 3 and swarm.engine.global_steps == 8:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return real(swarm)

    Swarm.should_stop = should_stop
    return run_main(argv)


@pytest.mark.slow  # what a checkpoint holds is compared bit for bit in integration/test_resume.py
def test_resumed_run_ends_where_the_uninterrupted_one_does(pool, tiny, tmp_path):
    config = json.loads((REPO / "ds_config_examples/zero2_pso_all_time.json").read_text())
    config["scheduler"]["params"]["total_num_steps"] = 30
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    pool.run(run_main, tiny(path, 30, "whole"), timeout=120)
    results = pool.run(run_main_and_be_asked, tiny(path, 19, "parts"), timeout=120)
    assert [code for code, _, _ in results] == [75] * 4
    assert "stopped by a signal after step" in results[0][1]
    assert not (tmp_path / "parts/model").exists()
    pool.run(run_main, [*tiny(path, 19, "parts", save_every=2), "--resume"], timeout=120)  # between two sync points
    kept = sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir())
    assert kept == ["latest", "step_00000018", "step_00000019"]
    pool.run(run_main, [*tiny(path, 30, "parts"), "--resume"], timeout=120)
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name

    def syncs(name):
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(record["step"], record["losses"]) for record in records if record["event"] == "sync"]

    assert syncs("whole") == syncs("parts")


@pytest.mark.slow
def test_resumes_in_an_empty_folder_from_an_object_store(pool, tiny, tmp_path):
    config = json.loads((REPO / "ds_config_examples/zero2_pso_all_time.json").read_text())
    config["scheduler"]["params"]["total_num_steps"] = 16
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    pool.run(run_main, tiny(path, 16, "whole"), timeout=120)
    config["swarm"]["remote_checkpoints"] = f"file://{tmp_path}/remote"
    path.write_text(json.dumps(config))
    pool.run(run_main, tiny(path, 9, "lost", save_every=2, keep_checkpoints=1), timeout=120)
    kept = sorted(path.name for path in (tmp_path / "remote").iterdir())
    assert kept == ["latest", "step_00000009", "step_00000009.json"]
    results = pool.run(run_main, [*tiny(path, 16, "fresh"), "--resume"], timeout=120)
    assert [code for code, _, _ in results] == [0] * 4
    whole, fresh = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "fresh"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, fresh[name]), name


def test_a_second_run_moves_the_first_aside(pool, tiny, tmp_path):
    for _ in range(2):
        results = pool.run(run_main, tiny(steps=2), world_size=2, timeout=120)
        assert results[0][0] == 0
    assert (tmp_path / "run.1" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_own_model_under_zero_3(pool, tiny, tmp_path):
    pool.run(run_main, tiny(steps=2, output_dir="first"), world_size=2, timeout=120)
    config = REPO / "ds_config_examples/zero3_local_sgd.json"
    arguments = tiny(config, 34, "second", model=tmp_path / "first" / "model")
    results = pool.run(run_main, arguments, timeout=120)
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    check_run(tmp_path / "second", 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"deepspeed_config": "nowhere.json"}, "nowhere.json"),
        ({"steps": 0}, "--steps"),
        ({"model": "llama:1x33"}, "llama:1x33"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"dataset": "/nowhere/text"}, "/nowhere/text"),
        ({"seq_length": 10**6}, "--seq_length 1000000"),
    ],
)
def test_bad_input_is_one_line_from_the_leader(pool, tiny, changes, named):
    arguments = tiny(**({"config": changes["deepspeed_config"]} if "deepspeed_config" in changes else changes))
    results = pool.run(run_main, arguments, world_size=2, env={"HF_HUB_OFFLINE": "1"}, timeout=120)
    assert [code for code, _, _ in results] == [1, 1]
    errors = [line for line in results[0][2].splitlines() if line.startswith("ds_pso: error:")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "ds_pso: error" not in results[1][2]


def test_nothing_to_resume(pool, tiny, tmp_path):
    results = pool.run(run_main, [*tiny(), "--resume"], world_size=2, timeout=60)
    assert [code for code, _, _ in results] == [1, 1]
    assert "nothing to resume" in results[0][2]
    assert not (tmp_path / "run").exists()
