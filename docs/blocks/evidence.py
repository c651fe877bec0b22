"""The tables and pictures that `python -m benchmarks.evidence` has made of one experiment's committed results."""

from __future__ import annotations

import re
from pathlib import Path

GENERATED = Path(__file__).parents[1] / "generated"
FIRST_LOOK = "-first-look"


def evidence(experiment: str) -> str:
    """For a page in `docs/evidence`."""
    parts: list[str] = []
    tables = chosen(experiment)
    is_first_look = any(FIRST_LOOK in table.stem for table in tables)
    if is_first_look:
        parts.append("*Of the smaller setting of this experiment (`--first-look`). Each table names its seeds.*")
    for table in tables:
        parts.append(re.sub(r"<!--.*?-->", "", table.read_text(encoding="utf-8"), flags=re.DOTALL).strip())
    parts += [
        f"![{picture.stem.replace('-', ' ')}](../generated/{picture.name})"
        for picture in sorted(GENERATED.glob("*.png"))
        if re.fullmatch(rf"{re.escape(experiment)}(-.*)?", picture.stem)
    ]
    if not parts:
        parts = ["No results of this experiment are committed yet."]
    command = f"python -m benchmarks.evidence run {experiment}{' --first-look' if is_first_look else ''}"
    parts.append(f"Run it again: `{command}` (`--estimate` says how long it takes).")
    return "\n\n".join(parts)


def chosen(experiment: str) -> list[Path]:
    """The tables of the whole experiment; those of its first look where it was not run yet."""
    pattern = re.compile(rf"evidence-{re.escape(experiment)}(-.*)?")
    tables = [path for path in sorted(GENERATED.glob("evidence-*.md")) if pattern.fullmatch(path.stem)]
    whole = [path for path in tables if not path.stem.endswith(FIRST_LOOK)]
    return whole or tables
