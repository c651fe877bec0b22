"""The code of a Markdown page, in the order in which a reader runs it.

A page is one program: later blocks use what earlier ones made. What a reader is not shown, such as a tiny model, stands
in an HTML comment that begins with `<!-- run`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"^(?:```(?P<language>python|bash|diff)\n(?P<code>.*?)^```$|<!-- run\n(?P<hidden>.*?)^-->$)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    """Of the page, where the code begins."""


def pages() -> list[Path]:
    """Every page with code to run, and the README."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if "_build" not in page.parts and blocks(page)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        group = "hidden" if match["code"] is None else "code"
        line = text.count("\n", 0, match.start(group)) + 1
        found.append(Block(match["language"] or "python", match[group], line))
    return found


def after(diff: str) -> str:
    """The code that a diff leads to."""
    return "".join(line[2:] + "\n" for line in diff.splitlines() if not line.startswith("-"))
