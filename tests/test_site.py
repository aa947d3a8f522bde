"""The documentation site: it builds without a warning, shows what GitHub shows, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from test_docs import PAGES, ROOT, TEXT, short

import ds_pso

pytestmark = pytest.mark.slow  # a site for all of them

COUNTED = ("h1", "h2", "h3", "pre", "table", "tr", "li", "img")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a page that the navigation leaves out, a broken link or an anchor that is missing ends it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        timeout=200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return folder


class Article(HTMLParser):
    """Counts tags of a page's own text, and collects what the whole page loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.loaded: list[str] = []
        self._inside = 0
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("script", "img", "iframe") or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded.append(given.get("src") or given.get("href") or "")
        self.tags[tag] += self._inside > 0
        self._inside += tag == "article"

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag == "article"


def built(site: Path, page: Path) -> Path:
    name = "index.html" if page.name == "README.md" else f"{page.stem}.html"
    return site / page.relative_to(ROOT).parent / name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "reference.md"], ids=short)
def test_a_page_shows_what_github_shows(site: Path, page: Path) -> None:
    """CommonMark and the site's Markdown differ in where a list, a table or a block of code begins."""
    expected: Counter[str] = Counter()
    for token in MarkdownIt().enable("table").parse(TEXT[page]):
        if token.nesting >= 0:
            expected["pre" if token.type in ("fence", "code_block") else token.tag] += 1
        expected["img"] += sum(child.type == "image" for child in token.children or ())
    actual = Article(built(site, page)).tags
    assert {tag: actual[tag] for tag in COUNTED} == {tag: expected[tag] for tag in COUNTED}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loaded = {address for page in pages for address in Article(page).loaded}
    assert "docs/swarm.svg" in loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_reference_describes_what_is_public(site: Path) -> None:
    text = (site / "docs/reference.html").read_text(encoding="utf-8")
    described = set(re.findall(r'id="(ds_pso[\w.]*)"', text))
    calls = {f"ds_pso.Swarm.{name}" for name in vars(ds_pso.Swarm) if not name.startswith("_")}
    others = {f"ds_pso.{name}" for name in ds_pso.__all__} - {"ds_pso.__version__"}
    assert calls | others <= described


def test_a_source_file_that_a_page_links_to_is_shown(site: Path) -> None:
    assert 'href="../recipes/own_script.py.html"' in (site / "docs/api.html").read_text(encoding="utf-8")
    assert "deepspeed.initialize" in re.sub("<[^>]+>", "", (site / "recipes/own_script.py.html").read_text("utf-8"))
