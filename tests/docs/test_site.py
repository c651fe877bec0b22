"""The built site: its search finds things, and its links lead somewhere. `.ci/run` builds it before the tests run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from .pages import ROOT

SITE = ROOT / "docs" / "_build"
pytestmark = pytest.mark.skipif(
    not (SITE / "searchindex.js").exists(), reason="build it: sphinx-build docs docs/_build"
)


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids.update(value for key, value in attrs if key in ("id", "name") and value)
        self.links += [value for key in ("href", "src") if (value := named.get(key))]


def search_index() -> dict[str, Any]:
    script = (SITE / "searchindex.js").read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(script.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    return index


@pytest.mark.parametrize(
    ("word", "page"),
    [("window", "layers"), ("torchrun", "tools"), ("weight", "gate"), ("checkpoint", "loop"), ("cost", "cost")],
)
def test_search_finds(word: str, page: str) -> None:
    index = search_index()
    found = {**index["terms"], **{term: pages for term, pages in index["titleterms"].items() if term == word}}
    numbers = [found[word]] if isinstance(found[word], int) else found[word]
    titles = index["titleterms"].get(word, [])
    numbers = [*numbers, *([titles] if isinstance(titles, int) else titles)]
    assert page in {index["docnames"][number] for number in numbers}


def test_search_finds_the_names_of_the_library() -> None:
    entries = [entry for of_prefix in search_index()["objects"].values() for entry in of_prefix]
    names = {entry[-1] if isinstance(entry, list) else entry for entry in entries}
    assert {"GAPTOptimizer", "RepresentationHook", "matrix_entropy", "PhaseGate"} <= names


def test_links_within_the_site_lead_somewhere() -> None:
    pages = {path: Page(path) for path in SITE.rglob("*.html")}
    assert len(pages) > 20
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or re.match(r"(data|mailto):", link):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].ids if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in known):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken
