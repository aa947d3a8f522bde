"""The picture and the closing words of a run."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as mpl_image

from ds_pso.metrics import MetricsLog
from ds_pso.training.progress import human_bytes
from ds_pso.training.report import plot_losses, summary


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5e15, "5000.0 TB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_plot_shows_something_for_every_particle(tmp_path, num_particles):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(0, 50, 10):
        losses = [5.0 - step / 20 + particle for particle in range(num_particles)]
        log.write("held_out", step, {"losses": losses})
        log.write("train" if num_particles == 1 else "sync", step, {"losses": losses})
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    pixels = mpl_image.imread(tmp_path / "loss.png")[:, :, :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert not (tmp_path / "loss.tmp.png").exists()


def test_a_run_without_any_record_still_gives_a_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_summary_names_files_bytes_and_losses():
    text = summary(
        run_dir=Path("runs/x"),
        files={"the same as a picture": Path("runs/x/loss.png")},
        first_loss=8.25,
        last_loss=4.5,
        swarm_bytes=1_000_000,
        gradient_bytes=16_000_000,
        sync_line="5 sync points",
        sample="def f():\n  pass",
    )
    for expected in ("8.250", "4.500", "1.0 MB", "16.0 MB", "16.0 x", "runs/x/loss.png", "  def f():"):
        assert expected in text


def test_summary_of_one_particle_does_not_speak_of_exchange():
    text = summary(
        run_dir=Path("r"),
        files={"a": Path("b")},
        first_loss=1,
        last_loss=1,
        swarm_bytes=0,
        gradient_bytes=0,
        sync_line="",
        sample="",
    )
    assert "Exchanged" not in text
