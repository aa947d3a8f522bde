"""Draws and saves the figures of a report: colours, axes, labels beside lines, SVG and PNG."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from ds_pso.utils.atomic_io import open_atomically

# Of the page and its figures. The first six of the series are Okabe and Ito's, which the colour-blind tell apart,
# those that are pale on white made darker.
LIGHT = {
    **{"paper": "#ffffff", "ink": "#1b1f24", "muted": "#5b6570", "grid": "#dfe3e8"},
    **{"c0": "#0072b2", "c1": "#d55e00", "c2": "#00906a", "c3": "#b85c92", "c4": "#b07a00", "c5": "#3f97c9"},
}
DARK = {
    **{"paper": "#14171b", "ink": "#e8eaed", "muted": "#9aa4af", "grid": "#31373e"},
    **{"c0": "#4da3dc", "c1": "#f0813a", "c2": "#2fbf95", "c3": "#e08fbe", "c4": "#e0ac3a", "c5": "#8fd0f2"},
}
INK, MUTED, GRID = LIGHT["ink"], LIGHT["muted"], LIGHT["grid"]
SERIES = [value for name, value in LIGHT.items() if name.startswith("c")]
LINES = ("-", "--", ":", "-.")  # once the colours are used up

STEPS = "optimizer steps"
WIDTH = 5.4  # inches
POINTS = 400  # of a line at most
FEW = len(SERIES)  # particles that have a color and a name each
STYLE = {
    "figure.facecolor": LIGHT["paper"],
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titlepad": 8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.5,
    "svg.fonttype": "none",
}


def color_of(number: int) -> str:
    return SERIES[number % len(SERIES)]


def line_of(number: int) -> str:
    return LINES[number // len(SERIES) % len(LINES)]


def short(label: str, length: int = 18) -> str:
    return label if len(label) <= length else f"{label[: length // 2]}…{label[-((length - 1) // 2) :]}"


def new_figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Make axes below one another, over the same range; heights in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights)))
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=list(heights))
    return figure, [row[0] for row in axes]


def thin(values: Sequence[float]) -> np.ndarray:
    """Reduce to at most POINTS numbers, each the mean of as many neighbours; NaN where none of them is finite."""
    array = np.asarray(values, dtype=float)
    size = max(1, math.ceil(len(array) / POINTS))
    array = np.pad(array, (0, -len(array) % size), constant_values=math.nan).reshape(-1, size)
    known = np.isfinite(array)
    count = known.sum(axis=1)
    return np.where(count > 0, np.where(known, array, 0.0).sum(axis=1) / np.maximum(count, 1), math.nan)


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, **options: Any) -> Line2D | None:
    """Draw a line, with dots where there are few; None if there is nothing to see."""
    known = np.count_nonzero(np.isfinite(y) & np.isfinite(x))
    if not known:
        return None
    dots = {"marker": "o", "markersize": 3} if known <= 40 else {}
    return axes.plot(x, y, **{**dots, **options})[0]


def finish(
    axes: Axes, named: Sequence[tuple[Line2D, str]] = (), *, title: str, xlabel: str = "", from_zero: bool = False
) -> None:
    """Set limits and ticks, and name lines in a legend beside the axes; a line whose name is empty is not in it."""
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=xlabel in ("", STEPS)))
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if from_zero:
        axes.set_ylim(0.0, 1.08 * high or 1.0)
    elif low > 0 and high / low > 30:
        ticks = LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,), numticks=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    named = [(line, name) for line, name in named if name]
    if named:
        legend = axes.legend(*zip(*named, strict=True), loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        for text, (line, _) in zip(legend.get_texts(), named, strict=True):
            text.set_parse_math(False)
            text.set_color(line.get_color())


def save_png(figure: Figure, path: Path, title: str = "") -> None:
    """Save a figure; ``title`` comes above it, where on a page its heading is."""
    width, height = figure.get_size_inches()
    room = 0.3 if title else 0.0
    with matplotlib.rc_context(STYLE):
        _lay_out(figure)
        if title:
            figure.text(0.02, 1.0, title, va="bottom", fontsize=11, color=INK, parse_math=False)
        box = Bbox([[0.0, 0.0], [width, height + room]])
        with open_atomically(path) as file:
            figure.savefig(file, format="png", dpi=150, bbox_inches=box, metadata={"Software": None})


def _lay_out(figure: Figure) -> None:
    """Lay the figure out once for all files that are made of it: it takes longer than drawing them."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Return an ``svg`` element for a page: its colours are the page's variables, and its ids begin with ``name``."""
    file = StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        _lay_out(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<!--.*?-->\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)  # text in them is escaped
    variables = {value: f"var(--{key})" for key, value in LIGHT.items()}
    text = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})", lambda m: m[1] + variables.get(m[2], m[2]), text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(title)}">{text}'
