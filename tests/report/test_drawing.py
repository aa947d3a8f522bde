"""Lines that stay small, names in legends, and SVG that belongs to a page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from ds_pso.report.drawing import (
    DARK,
    LIGHT,
    POINTS,
    STYLE,
    draw,
    finish,
    new_figure,
    save_png,
    short,
    thin,
    to_svg,
)


def test_short_lines_are_drawn_as_they_are():
    np.testing.assert_array_equal(thin([1.0, math.nan, math.inf, 4.0]), [1.0, math.nan, math.nan, 4.0])
    assert len(thin([])) == 0


def test_long_lines_are_means_of_neighbours():
    values = np.arange(2.5 * POINTS)  # three at a time
    values[3] = math.nan
    values[6:9] = math.nan
    expected = [1.0, 4.5, math.nan, 10.0]
    np.testing.assert_array_equal(thin(values)[:4], expected)
    assert thin(values)[-1] == values[-1]  # 1000 = 333 * 3 + 1
    assert len(thin(values)) == 334


def test_long_names_keep_both_ends():
    assert short("a" * 18) == "a" * 18
    assert short("0123456789abcdefghij") == "012345678…cdefghij"


@matplotlib.rc_context(STYLE)
def svg_of(label: str, name: str = "one") -> str:
    figure, (axes,) = new_figure([2.0])
    line = draw(axes, np.arange(3.0), np.array([1.0, 2.0, 3.0]), color=LIGHT["c1"])
    finish(axes, [(line, label)], title=label, xlabel="optimizer steps")
    return to_svg(figure, name, label)


def test_svg_is_for_a_page():
    svg = svg_of("loss")
    assert svg.startswith('<svg viewBox="0 0 ')
    assert "stroke: var(--c1)" in svg
    assert "fill: var(--muted)" in svg
    assert not set(re.findall("#[0-9a-f]{6}", svg)) & set(LIGHT.values()), "a colour that does not change in dark mode"
    assert "http" not in svg
    assert "DejaVu" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("one-") for name in ids)
    for used in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg):
        assert "".join(used) in ids
    assert svg == svg_of("loss"), "the same figure gives the same text"


def test_every_colour_has_one_for_dark_pages():
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT), "to_svg tells them apart by their value"


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_text_stand_out_from_the_paper(palette):
    for name, color in palette.items():
        low, high = sorted([luminance(color), luminance(palette["paper"])])
        contrast = (high + 0.05) / (low + 0.05)
        least = {"ink": 7.0, "muted": 4.5, "grid": 1.0, "paper": 1.0}.get(name, 3.0)  # WCAG: graphics 3, text 4.5
        assert contrast >= least, name


@pytest.mark.parametrize("label", ["$x$ \\frac{ $y$", "<script>alert(1)</script>", '--> " & ]]>'])
def test_names_are_text_and_nothing_else(label):
    svg = svg_of(label)
    assert "".join(ElementTree.fromstring(svg).itertext()).count(label) == 2, "the title and the legend"
    assert "<script" not in svg
    assert "-->" not in svg.replace("--&gt;", "")


def test_png_is_complete_or_not_there(tmp_path):
    figure, (axes,) = new_figure([2.0])
    finish(axes, title="nothing")
    save_png(figure, tmp_path / "a.png", "Title with $ in it")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
