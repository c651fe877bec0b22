"""Count the cases that hold each promise, in the record of a run of the suite.

python -m pytest --junitxml=junit.xml
python docs/promises.py junit.xml              # writes docs/generated/promises.md
python docs/promises.py junit.xml --check      # fails where a promise has no case, or one that failed
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parent
OUT = DOCS / "generated" / "promises.md"


@dataclass(frozen=True)
class Promise:
    area: str
    text: str
    tests: list[str]


@dataclass(frozen=True)
class Count:
    cases: int
    failed: int
    skipped: int


def promises() -> list[Promise]:
    table: dict[str, Any] = tomllib.loads((DOCS / "promises.toml").read_text(encoding="utf-8"))
    return [Promise(**each) for each in table["promise"]]


def outcomes(junit: Path) -> dict[str, Counter[str]]:
    """By `file::function`, relative to `tests`: how many cases passed, failed and were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        parts = case.attrib["classname"].split(".")[1:]
        name = f"{'/'.join(parts)}.py::{case.attrib['name'].partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(name, Counter())[outcome] += 1
    return found


def count(promise: Promise, found: dict[str, Counter[str]]) -> Count:
    total: Counter[str] = Counter()
    for test in promise.tests:
        for name, counter in found.items():
            if name == test or ("::" not in test and name.startswith(test + "::")):
                total += counter
    return Count(total["passed"] + total["failed"], total["failed"], total["skipped"])


def table(junit: Path) -> str:
    found = outcomes(junit)
    lines = ["| area | promise | held by | cases | failed |", "|---|---|---|---:|---:|"]
    for promise in promises():
        counted = count(promise, found)
        held = "<br>".join(f"`{test}`" for test in promise.tests)
        lines.append(f"| {promise.area} | {promise.text} | {held} | {counted.cases} | {counted.failed} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("junit", type=Path, help="what pytest wrote with --junitxml")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a promise is not held")
    arguments = parser.parse_args()
    if not arguments.check:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(table(arguments.junit), encoding="utf-8")
        print(OUT)
        return 0
    found = outcomes(arguments.junit)
    counts = {promise.text: count(promise, found) for promise in promises()}
    broken = [text for text, counted in counts.items() if counted.cases == 0 or counted.failed]
    for text in broken:
        print(f"not held by the suite: {text} ({counts[text].cases} cases, {counts[text].failed} failed)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
