"""Links of every Markdown page: files, pictures and titles of the project exist, other addresses are well-formed.

Whether other sites answer is for the workflow `links.yml`, as they come and go.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .pages import ROOT

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"_build", "generated"} & set(path.parts) and not any(part.startswith(".") for part in path.parts[1:])
)
_LINK = re.compile(r"\]\(<?([^)>\s]+)>?\)")
_URL = re.compile(r"https?://[^\s)>`\"']+")


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "code", text)


def anchors(page: Path) -> set[str]:
    """Of the titles of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_addresses_are_well_formed(page: Path) -> None:
    for url in _URL.findall(page.read_text(encoding="utf-8")):
        parts = urlsplit(url.rstrip(".,;:"))
        assert parts.scheme == "https", url
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.hostname or ""), url


def test_there_are_pages_and_links() -> None:
    assert len(PAGES) > 25
    assert sum(len(_LINK.findall(prose(page))) for page in PAGES) > 60
