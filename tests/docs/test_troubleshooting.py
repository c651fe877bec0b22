"""Titles of the troubleshooting page that quote a message quote one that the library has."""

from __future__ import annotations

import re
import sys

import pytest

from .pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from blocks.messages import messages

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TITLES = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
OF_PYTORCH = [
    "'ModelReturn' object has no attribute '__name__'",
]
TEXTS = [message.text for message in messages(ROOT / "gapt_optim")]


def test_page_has_titles() -> None:
    assert len(TITLES) > 20
    assert len(set(TITLES)) == len(TITLES)


@pytest.mark.parametrize("title", [title for title in TITLES if title not in OF_PYTORCH])
def test_title_is_a_message_of_the_library(title: str) -> None:
    pattern = ".*".join(map(re.escape, re.split("…", title)))
    assert any(re.search(pattern, text) for text in TEXTS), "no message of the library has these words"


def test_no_message_lost_its_text() -> None:
    assert len(TEXTS) > 60
    assert all(re.search(r"[a-z]{3}", text) for text in TEXTS)
