"""The closing words of a run."""

from pathlib import Path
from types import SimpleNamespace

from ds_pso.sync.parts import SyncTotals
from ds_pso.training.closing import summary
from ds_pso.training.job import _sync_line


def test_summary_names_files_bytes_and_losses():
    text = summary(
        run_dir=Path("runs/x"),
        files={"the losses as a picture": Path("runs/x/loss.png")},
        first_loss=8.25,
        last_loss=4.5,
        sync_mode="local_sgd",
        swarm_bytes=1_000_000,
        gradient_bytes=16_000_000,
        sync_line="5 sync points",
        sample="def f():\n  pass",
    )
    for expected in ("8.250", "4.500", "1.0 MB", "16.0 MB", "16.0 x", "runs/x/loss.png", "  def f():", '"local_sgd"'):
        assert expected in text


def test_summary_of_one_particle_does_not_speak_of_exchange():
    text = summary(
        run_dir=Path("r"),
        files={"a": Path("b")},
        first_loss=1,
        last_loss=1,
        sync_mode="local_sgd",
        swarm_bytes=0,
        gradient_bytes=0,
        sync_line="",
        sample="",
    )
    assert "Exchanged" not in text


def test_one_particle_waits_for_nobody() -> None:
    totals = SyncTotals(count=3, seconds=1.25)
    assert _sync_line(SimpleNamespace(num_particles=1, totals=totals)) == "3 sync points took 1.2 s"
    waited = "3 sync points took 1.2 s, of it 0.0 s waiting for the slowest particle"
    assert _sync_line(SimpleNamespace(num_particles=2, totals=totals)) == waited
