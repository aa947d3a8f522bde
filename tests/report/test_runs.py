"""Reading metrics.jsonl: which records belong to a run, the numbers of it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_runs import losses, small, start, sync, write

from ds_pso.errors import ConfigError
from ds_pso.report.reading import read_runs
from ds_pso.report.runs import Run, mean
from ds_pso.report.thinning import best_particle


def read(folder: Path, records, rest: str = "") -> Run:
    (run,) = read_runs([write(folder, records, rest)])
    return run


def test_the_numbers_of_a_run(tmp_path):
    run = read(tmp_path, small())
    assert (run.final_loss, run.final_held_out, run.exported_loss) == (1.5, 4.0, 3.5)
    assert (run.num_particles, run.steps, len(run.syncs)) == (2, 12, 3)
    assert run.seconds == 10.0  # without the export
    assert run.stood_still == pytest.approx(2.0 / 10.0)
    assert [run.bytes_by(step) for step in (3, 4, 7, 8, 12, 99)] == [
        0,
        3_000_000,
        3_000_000,
        *[4_000_000],
        *[5_000_000] * 2,
    ]
    assert run.bytes_received == 5_000_000
    assert [best_particle(sync.record) for sync in run.syncs] == [1, 1, None]  # of the last only one loss is known
    assert run.is_finished


def test_what_is_known_of_a_run_that_has_just_begun(tmp_path):
    run = read(tmp_path, [start()])
    assert (run.steps, run.seconds, run.bytes_received, run.syncs, run.training) == (0, 0.0, 0, [], [])
    assert all(math.isnan(n) for n in (run.final_loss, run.final_held_out, run.exported_loss, run.stood_still))
    assert not run.is_finished


def test_a_run_without_a_start_is_one_of_an_older_version(tmp_path):
    run = read(tmp_path, small()[2:])
    assert (run.description, run.num_particles, run.seconds) == ("2 particles", 2, 12.0)


@pytest.mark.parametrize("rest", ["", '{"event": "sync", "st', "{"])
def test_a_line_that_is_being_written_is_left_out(tmp_path, rest):
    run = read(tmp_path, small()[:4], rest)
    assert (run.steps, run.is_finished) == (8, False)


@pytest.mark.parametrize(
    ("records", "finished"),
    [
        ([start(total_steps=12), sync(8, 3.0, [1.0, 1.0])], False),
        ([start(total_steps=12), sync(12, 3.0, [1.0, 1.0])], True),
        ([start(), sync(12, 3.0, [1.0, 1.0])], False),
        ([start(), losses("exported", 12, 3.0, [1.0])], True),
        ([start(), losses("exported", 12, 3.0, [1.0]), start(12, 3.0), sync(16, 5.0, [1.0, 1.0])], False),
    ],
)
def test_when_a_run_is_finished(tmp_path, records, finished):
    assert read(tmp_path, records).is_finished == finished


def test_the_arguments_beside_the_metrics_say_how_long_it_will_be(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"steps": 20, "model": "llama:1x32"}}))
    run = read(tmp_path, [start(total_steps=99), sync(12, 3.0, [1.0, 1.0])])
    assert (run.total_steps, run.arguments["model"]) == (20, "llama:1x32")


@pytest.mark.parametrize("text", ["", "[]", '{"arguments": 3}', "{", "\x00"])
def test_another_config_beside_the_metrics_does_no_harm(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert read(tmp_path, small()).arguments == {}


# -- runs that were interrupted ---------------------------------------------------------------


def steps(run: Run) -> list[tuple[str, int]]:
    return [(entry.event, entry.step) for entry in run.entries]


def test_a_resumed_run_is_one_run(tmp_path):
    run = read(tmp_path, [start(), sync(4, 3.0, [2.0, 2.0]), start(6, 3.0, ranks=5), sync(8, 5.0, [1.0, 1.0])])
    assert steps(run) == [("start", 0), ("sync", 4), ("start", 6), ("sync", 8)]
    assert (run.resumed_at, run.start.record.ranks, run.seconds) == ([6], 5, 3.0)


def test_what_came_after_the_checkpoint_is_not_part_of_it(tmp_path):
    records = [start(), sync(4, 3.0, [2.0, 2.0]), sync(8, 4.0, [9.0, 9.0]), start(6, 3.0), sync(8, 5.0, [1.0, 1.0])]
    run = read(tmp_path, records)
    assert steps(run) == [("start", 0), ("sync", 4), ("start", 6), ("sync", 8)]
    assert run.final_loss == 1.0


def test_of_runs_one_after_another_the_last_one_counts(tmp_path):
    run = read(tmp_path, [*small(), start(0, 0.5), sync(4, 2.5, [7.0, 7.0])])
    assert steps(run) == [("start", 0), ("sync", 4)]
    assert (run.seconds, run.resumed_at) == (2.0, [])


def test_a_start_that_nothing_came_of_changes_nothing(tmp_path):
    run = read(tmp_path, [*small(), start(0, 0.5), start(0, 0.7)])
    assert run.final_loss == 1.5
    assert run.is_finished


# -- where the losses of all particles stand --------------------------------------------------


def test_training_losses_come_from_sync_points_if_these_know_them(tmp_path):
    run = read(tmp_path, small())
    assert [entry.step for entry in run.training] == [4, 8, 12]


def test_asynchronous_particles_know_their_own_loss_alone(tmp_path):
    points = [sync(4, 3.0, [2.0, None], **{"from": None}), sync(8, 4.0, [1.5, None], **{"from": 1, "age": 0})]
    alone = read(tmp_path / "a", [start(), *points])
    assert [entry.record.losses[0] for entry in alone.training] == [2.0, 1.5]
    assert alone.final_loss == 1.5
    evaluated = read(tmp_path / "b", [start(), *points, losses("train", 8, 4.5, [3.0, 4.0])])
    assert [entry.record.losses for entry in evaluated.training] == [[3.0, 4.0]]
    assert evaluated.final_loss == 3.5


def test_losses_on_a_probe_batch_are_no_training_losses(tmp_path):
    swarm = {"fitness": "probe"}
    run = read(tmp_path, [start(swarm=swarm), sync(4, 3.0, [2.0, 1.0]), losses("train", 4, 4.0, [5.0, 7.0])])
    assert run.final_loss == 6.0


def test_one_particle_has_no_sync_points(tmp_path):
    records = [start(particles=1, backend="none"), losses("train", 4, 3.0, [2.0]), losses("held_out", 4, 4.0, [2.5])]
    run = read(tmp_path, records)
    assert (run.final_loss, run.final_held_out, run.bytes_received, run.stood_still) == (2.0, 2.5, 0, 0.0)


def test_what_a_script_logs_itself_is_left_alone(tmp_path):
    own = [{"event": "train", "step": 2, "time_s": 3.0, "loss": 4}, losses("mine", 3, 4.0, [0.0])]
    run = read(tmp_path, [start(), *own, sync(4, 5.0, [2.0, 3.0])])
    assert run.final_loss == 2.5


def test_infinite_and_missing_losses_are_left_out_of_the_mean(tmp_path):
    run = read(tmp_path, [start(), sync(4, 3.0, [2.0, None]), sync(8, 4.0, [None, None])], '{"event": "x"')
    assert mean(run.training[0].record.losses) == 2.0
    assert math.isnan(run.final_loss)


# -- which files ------------------------------------------------------------------------------


def test_a_run_is_a_folder_or_a_file_and_named_once(tmp_path):
    folder = write(tmp_path / "first", small())
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "metrics.jsonl").read_text())
    runs = read_runs([folder, other, folder / "metrics.jsonl", tmp_path / "first" / ".." / "first"])
    assert [(run.label, run.number) for run in runs] == [("first", 0), ("other", 1)]


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / name / "latest", small()) for name in ("a", "b")]
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder}: holds no metrics.jsonl; give a folder that was the run_dir of ds_pso.init"),
        (b"", "{file}: holds no record of a run; give a metrics.jsonl, or wait until the run has begun"),
        (b"hello\nworld\n", "{file}: holds no record of a run; give a metrics.jsonl, or wait until the run has begun"),
        (b"\xff\xfe\x00", "{file}: not the metrics of a run (no UTF-8 text); give a metrics.jsonl"),
        (b"1\n2\n", "{file}: not the metrics of a run (Input should be a valid dictionary"),
        (b'{"a": 1}\n', "{file}: not the metrics of a run (event: Field required); give a metrics.jsonl"),
        (
            b'{"event": "sync", "step": 1, "time_s": 2, "losses": "x"}\n',
            "{file}: not the metrics of a run (losses: Input should be a valid list); give a metrics.jsonl",
        ),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_runs([folder])
    assert str(caught.value).startswith(message.format(folder=folder, file=folder / "metrics.jsonl"))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such run; give a run folder or its metrics.jsonl"):
        read_runs([tmp_path / "nowhere"])
