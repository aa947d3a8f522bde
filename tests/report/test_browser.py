"""The page in a real browser, where there is one: light and dark, wide and narrow."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_runs import small, start, sync, write
from matplotlib import image as mpl_image

from ds_pso.report import write_report
from ds_pso.report.drawing import DARK, LIGHT

SCRIPT = Path(__file__).with_name("browser.mjs")
FOLDER = os.environ.get("PUPPETEER")


@pytest.fixture(scope="module", params=["one run", "two runs"])
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [write(folder / "a", small())]
    if request.param == "two runs":
        points = [sync(4 * i, 3.0 * i, [9.0 / i, 8.0 / i], pressure=0.1 * i) for i in range(1, 30)]
        runs.append(write(folder / "with_a_long_name_of_its_own", [start(), *points]))
    return write_report(runs, images=False)


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="needs PUPPETEER, a folder with puppeteer-core and @sparticuz/chromium")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("scheme", "palette", "other"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_a_browser_shows_the_page(tmp_path, report, scheme, palette, other, width):
    picture = tmp_path / "page.png"
    done = subprocess.run(
        ["node", "--input-type=module", "-", report.as_uri(), picture, str(width), scheme],
        cwd=FOLDER,  # where node finds its modules
        input=SCRIPT.read_text(),
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["requests"] == [report.as_uri()], "something else was loaded"
    assert seen["messages"] == [], "such as a style that the page's own policy refuses"
    assert seen["width"] == width, "it has to be scrolled sideways"
    assert seen["outside"] <= 0, "text is cut off at the edge of the window"
    assert seen["overlaps"] == []
    pixels = (255 * mpl_image.imread(picture)[:, :, :3]).round().astype(int)
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {f"#{r:02x}{g:02x}{b:02x}": count for (r, g, b), count in zip(colors, counts, strict=True)}
    assert max(found, key=found.__getitem__) == palette["paper"]
    for name in ("ink", "muted", "grid", "c0", "c1"):
        assert found.get(palette[name], 0) > found.get(other[name], 0), name
