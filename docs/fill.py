"""Fills the parts of the pages that are made from code and results, so that a page is whole wherever it is read.

python docs/fill.py            # writes the pages
python docs/fill.py --check    # fails where a page differs

In a page, what stands between `<!-- filled: NAME ARGUMENT -->` and `<!-- end -->` is written here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from blocks.cost import cost
from blocks.endurance import endurance
from blocks.engines import engines
from blocks.evidence import evidence
from blocks.findings import findings
from blocks.messages import messages_by_module
from blocks.settings import settings

DOCS = Path(__file__).parent
BLOCKS: dict[str, Callable[..., str]] = {
    "cost": cost,
    "endurance": endurance,
    "engines": engines,
    "evidence": evidence,
    "findings": findings,
    "messages": messages_by_module,
    "settings": settings,
}
_BLOCK = re.compile(
    r"(?P<begin><!-- filled: (?P<name>\w+)(?P<arguments>[^\n]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def filled(page: str) -> str:
    """The page with its blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"no block is called {match['name']!r}; there are {', '.join(BLOCKS)}")
        return f"{match['begin']}\n{BLOCKS[match['name']](*match['arguments'].split())}\n\n{match['end']}"

    return _BLOCK.sub(block, page)


def pages() -> list[Path]:
    """With a block to fill."""
    found = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
    return [path for path in found if _BLOCK.search(path.read_text(encoding="utf-8"))]


def main(argv: list[str]) -> int:
    check = "--check" in argv
    stale = [path for path in pages() if filled(text := path.read_text(encoding="utf-8")) != text]
    for path in stale:
        if not check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{path.relative_to(DOCS)}: {'differs; run python docs/fill.py' if check else 'written'}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
