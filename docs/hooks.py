"""MkDocs hooks: the site has the repository's layout, so that relative links lead to the same place in both."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "[!.]*/README.md", "benchmarks/*/results/*.md")
LINK = re.compile(r"\]\(([^)\s#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every page, and every file that one of them links to, under its path in the repository."""
    site = Files([file for file in files if file.src_dir != config.docs_dir])  # the theme's
    pages = {page for pattern in PAGES for page in ROOT.glob(pattern)}
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    for path in sorted(filter(Path.is_file, pages | linked)):  # MkDocs warns of a link to nothing
        name = os.path.relpath(path, ROOT)
        if path in pages or path.suffix in (".png", ".svg"):
            site.append(File.generated(config, name, abs_src_path=str(path)))
        else:
            site.append(File.generated(config, f"{name}.md", content=_shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return site


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a source file leads to the page that shows it."""

    def to_page(link: re.Match[str]) -> str:
        name = os.path.normpath(Path(page.file.src_uri).parent / link[1])
        return f"{link[0]}.md" if files.get_file_from_path(f"{name}.md") else link[0]

    return LINK.sub(to_page, markdown)


def _shown(path: Path) -> str:
    """A page with the source, left out of the search."""
    language, source = path.suffix[1:] or "text", path.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path.name}\n\n````{language}\n{source}````\n"
