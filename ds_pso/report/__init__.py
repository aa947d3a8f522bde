"""A report of runs: one HTML page that needs nothing else, and its figures as PNG files.

Knows ``metrics.jsonl``; must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_pso.report.reading import read_runs


def write_report(runs: Sequence[str | Path], output: str | Path | None = None, *, images: bool = True) -> Path:
    """Write ``output/report.html``, and the same figures as ``output/report/*.png``.

    Args:
        runs: run folders, or their ``metrics.jsonl``; they may still be going on.
        output: folder; that of the first run unless given.
        images: whether to write the PNG files.

    Returns:
        The page. The same metrics give the same page.

    Raises:
        ConfigError: there are no metrics; or the report cannot be written.
    """
    from ds_pso.report.page import write  # matplotlib takes its time

    found = read_runs([Path(run) for run in runs])
    return write(found, found[0].path.parent if output is None else Path(output), images)


def write_loss_picture(run: str | Path, image: Path) -> None:
    """Training and held-out loss of each particle over steps, sync points marked, as PNG; nothing without a loss."""
    from ds_pso.report.drawing import save_png
    from ds_pso.report.figures import loss

    figure = loss(read_runs([Path(run)]), "steps")
    if figure is not None:
        save_png(figure, image)
